"""Record what a tool answers, and replay it without the tool."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from appo_lightning.errors import AppoError, ConfigurationError, DataError, ToolBroken, ToolFailure
from appo_lightning.tools._keeper import KeepsAnswers, Store
from appo_lightning.tools._options import changed_option, option_digests, plain
from appo_lightning.tools._store import AnswerStore
from appo_lightning.tools._text_store import TextStore
from appo_lightning.tools.base import Tool, ToolSession

if TYPE_CHECKING:
    from appo_lightning.types import Task

CassetteMode = Literal["record", "replay"]

_GRACE = 1.05  # a tool that keeps its own time says more; the loop waits a little longer still


class CassetteTool(KeepsAnswers[Store], Tool):
    """Another tool with its answers on record, so that a run can be repeated without it, token by token.

    An answer is found again by its content: the tool's name, the task's id and metadata, the argument, and for a
    stateful tool every earlier argument of the session. Failures and time-outs are on record, too. Where the same call
    is answered twice while recording, the first answer holds for both. The recording is of one tool: with another class
    or other options (public attributes, but for those that change no answer) it is refused.

    Args:
        tool: the recorded one.
        path: the recording, on a local disk; several tools and processes may share it. JSON lines if the name ends with
            ``.jsonl``: to read and to keep in version control. Otherwise SQLite: for long runs.
        mode: "record" answers from the file what it holds, and asks the tool for the rest; "replay" never touches the
            tool, and stops the run at a call that is not on record.

    Raises:
        ConfigurationError: a cassette in a cassette.
        DataError: at a session's start: the file cannot be opened, is missing in replay mode, or was recorded with
            another tool.
    """

    def __init__(self, tool: Tool, path: str, mode: CassetteMode = "record") -> None:
        if isinstance(tool, CassetteTool):
            raise ConfigurationError("a cassette in a cassette has no effect; wrap the tool itself")
        if mode not in ("record", "replay"):
            raise ConfigurationError(f"mode must be 'record' or 'replay', got {mode!r}")
        self.tool, self.path, self.mode = tool, path, mode
        self.name, self.description, self.parameters = tool.name, tool.description, tool.parameters
        self.timeout_s, self.stateful, self.text_argument = tool.timeout_s, tool.stateful, tool.text_argument
        self._start_empty()

    def prepare(self) -> None:
        store, key, before = self._opened_store(), f"schema/{self.name}", self._schema_facts()
        if self.mode == "record":
            self.tool.prepare()
            self._describe()
            if self._schema_facts() != before:  # replay has no server to ask
                store.put(key, "", self._schema_facts())
        elif (facts := store.get(key)) is not None:
            self.description, self.parameters, self.text_argument = facts

    def open(self, task: Task) -> ToolSession:
        store = self._opened_store()
        inner = None
        if self.mode == "record":
            inner = self.tool.open(task)
            self._describe()
        return _CassetteSession(self, store, inner, task)

    def close(self) -> None:
        super().close()
        self.tool.close()

    def _schema_facts(self) -> list[Any]:
        return [self.description, self.parameters, self.text_argument]

    def _describe(self) -> None:
        # Some tools know these only when their server runs.
        self.description, self.parameters = self.tool.description, self.tool.parameters
        self.text_argument = self.tool.text_argument

    def _open_store(self) -> Store:
        if self.mode == "replay" and not Path(self.path).is_file():
            raise DataError(
                f"replay: expected recorded calls of {self.name!r} at {self.path}, found no file; record first"
            )
        store: Store = TextStore(self.path) if self.path.endswith(".jsonl") else AnswerStore(self.path)
        try:
            self._check_recorded(store)
        except BaseException:
            store.close()
            raise
        return store

    def _check_recorded(self, store: Store) -> None:
        key = f"tool/{self.name}"
        recorded = store.put(key, "", option_digests(self.tool)) if self.mode == "record" else store.get(key)
        if recorded is None:
            raise DataError(
                f"replay: expected recorded calls of {self.name!r} in {self.path}, found none; record again"
            )
        if difference := changed_option(self.tool, recorded):
            raise DataError(
                f"{self.path} was recorded with another {self.name!r}: {difference}; set it as it was, or record into "
                "another file"
            )


class _CassetteSession(ToolSession):
    def __init__(self, cassette: CassetteTool, store: Store, inner: ToolSession | None, task: Task) -> None:
        self._cassette, self._store, self._inner, self._task_id = cassette, store, inner, task.id
        self._context = _digest([cassette.name, task.id, plain(task.metadata)])
        self._history: list[str] = []  # arguments so far; of a stateful tool
        self._done = 0  # of these, how many the inner session has seen
        self._thread: threading.Thread | None = None  # of the last call

    def call(self, argument: str) -> str:
        key = _digest([self._context, self._history, argument])
        answer = self._store.get(key)
        self._cassette._count(lookups=1, hits=int(answer is not None))
        if answer is None:
            # What the file holds is what every later run will read: so it is what this one reads.
            label = f"{self._task_id} {self._cassette.name} {argument}"
            answer = self._store.put(key, label, self._asked(argument))
        if self._cassette.stateful:
            self._history.append(argument)
        text, failure = answer
        if failure is not None:
            raise ToolFailure(text, failure)
        return text

    def interrupt(self) -> None:
        if self._inner is not None:
            self._inner.interrupt()

    def close(self) -> None:
        inner, self._inner = self._inner, None
        if inner is None:
            return
        thread = self._thread
        if thread is None or not thread.is_alive():
            inner.close()
            return

        def close_afterwards() -> None:
            thread.join()
            inner.close()

        # A call that was given up still runs: closing must not overlap it.
        threading.Thread(target=close_afterwards, daemon=True, name="appo-cassette").start()

    def _asked(self, argument: str) -> list[str | None]:
        """The tool's answer as text and kind of failure."""
        if self._inner is None:
            raise ToolBroken(
                f"replay: {self._cassette.path} holds no answer of {self._cassette.name!r} to {argument!r:.80} in task "
                f"{self._task_id}; the task or an earlier token or call differs from those recorded: record again"
            )
        # Calls that were answered from the file: the tool has to catch up with them.
        for earlier in self._history[self._done :]:
            self._timed(self._inner, earlier)
        answer = self._timed(self._inner, argument)
        self._done = len(self._history) + 1
        return answer

    def _timed(self, inner: ToolSession, argument: str) -> list[str | None]:
        """One call within the tool's time, which is kept here: the loop's own would leave no record."""
        answers: list[list[str | None] | BaseException] = []

        def call() -> None:
            try:
                answers.append([inner.call(argument), None])
            except ToolFailure as failure:
                answers.append([str(failure), failure.kind])
            except AppoError as error:
                answers.append(error)
            except BaseException as error:  # as the loop does: the policy reads it
                answers.append([f"{type(error).__name__}: {error}", "error"])

        self._thread = threading.Thread(target=call, daemon=True, name="appo-cassette")
        self._thread.start()
        self._thread.join(_GRACE * self._cassette.timeout_s)
        if not answers:
            inner.interrupt()
            return [f"no answer within {self._cassette.timeout_s:g} seconds", "timeout"]
        if isinstance(answers[0], BaseException):
            raise answers[0]
        return answers[0]


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
