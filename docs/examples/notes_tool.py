"""A tool with state: notes that one trajectory keeps."""

from __future__ import annotations

from appo_lightning.tools.base import Tool, ToolSession
from appo_lightning.types import Task


class NotesTool(Tool):
    """Keeps notes: ``<notes>text</notes>`` adds one and returns them all.

    Args:
        max_notes: the oldest are forgotten.
    """

    name = "notes"
    description = "Adds a note and returns all notes so far."
    stateful = True  # a branch replays the calls of its prefix, so that it starts with the notes made there

    def __init__(self, max_notes: int = 8) -> None:
        self.max_notes = max_notes

    def open(self, task: Task) -> ToolSession:
        return NotesSession(self.max_notes)


class NotesSession(ToolSession):
    """The notes of one trajectory."""

    def __init__(self, max_notes: int) -> None:
        self._max_notes = max_notes
        self._notes: list[str] = []

    def call(self, argument: str) -> str:
        self._notes = [*self._notes, argument][-self._max_notes :]
        return "\n".join(self._notes)


if __name__ == "__main__":
    session = NotesTool(max_notes=2).open(Task(id="trial", prompt_ids=[], references=()))
    for note in ("Emre lives in Oslo", "Oslo has 31 parks", "31 - 4 = 27"):
        print(session.call(note).replace("\n", " | "))
    session.close()
