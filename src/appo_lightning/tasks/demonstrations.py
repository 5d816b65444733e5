"""Demonstrations: responses to learn from before reinforcement learning, cut into labelled pieces."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from appo_lightning.errors import DataError

# decision: the demonstrator could have erred here; filler: uncertain but irrelevant; copied: stands in the text before;
# format: fixed by the format; tool: written by a tool, not trained on; text: not annotated.
Label = Literal["decision", "filler", "copied", "format", "tool", "text"]
LABELS: tuple[Label, ...] = ("decision", "filler", "copied", "format", "tool", "text")

_RESULT = re.compile(r"(<result>.*?</result>)", re.DOTALL)
# Neither tag of a call stands in its argument: as the tool loop reads it.
_ANSWERED_CALL = re.compile(
    r"<(?P<name>(?!(?:think|answer|result)>)[A-Za-z][\w-]*)>(?P<argument>(?:(?!</?(?P=name)>).)*)</(?P=name)>\s*"
    r"<result>(?P<result>.*?)</result>",
    re.DOTALL,
)


class Segment(NamedTuple):
    """A piece of a response."""

    text: str
    label: Label


@dataclass(slots=True)
class Demonstration:
    """A prompt and a response to imitate. The end-of-sequence token is implied.

    Calls stand in the paper's tags, whatever the format that a policy is to learn: ``rollout.imitation`` writes them in
    that.
    """

    messages: list[dict[str, str]]
    segments: list[Segment]

    @property
    def response(self) -> str:
        """The whole response, tool results included."""
        return "".join(segment.text for segment in self.segments)

    def part(self, start: int, stop: int) -> list[Segment]:
        """The pieces of the response between two of its characters."""
        found, position = [], 0
        for text, label in self.segments:
            if piece := text[max(0, start - position) : max(0, stop - position)]:
                found.append(Segment(piece, label))
            position += len(text)
        return found


class DemonstrationSource(ABC):
    """Demonstrations by index. ``demonstration(i)`` is a pure function of ``i`` and the constructor's arguments."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of demonstrations."""

    @abstractmethod
    def demonstration(self, index: int) -> Demonstration:
        """The demonstration at ``index`` in ``range(len(self))``."""


class JSONLDemonstrations(DemonstrationSource):
    """Your own demonstrations: one JSON object per line, ``{"messages": [...], "response": "..."}``.

    ``messages`` is the chat up to the response. Calls stand in it as ``<tool>argument</tool><result>...</result>``;
    results are shown to the policy but not trained on: a tool wrote them.

    Args:
        path: a UTF-8 file; blank lines are skipped.
    """

    def __init__(self, path: str) -> None:
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")  # text may hold other ends of lines
        except OSError as error:
            raise DataError(f"cannot read the demonstrations {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"cannot read the demonstrations {path}: expected UTF-8, found {error.reason}") from error
        self._rows = [_parse(line, f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]
        if not self._rows:
            raise DataError(f"{path} holds no demonstrations")

    def __len__(self) -> int:
        return len(self._rows)

    def demonstration(self, index: int) -> Demonstration:
        return self._rows[index]


def split_results(response: str) -> list[Segment]:
    """Cut a tagged response into text to train on and tool results."""
    # With one capturing group, every odd piece is a match.
    pieces = enumerate(_RESULT.split(response))
    return [Segment(text, "tool" if i % 2 else "text") for i, text in pieces if text]


def answered_calls(response: str) -> list[re.Match[str]]:
    """The calls of a tagged response with their results: groups ``name``, ``argument`` and ``result``.

    Raises:
        DataError: a result stands behind something else than a call.
    """
    calls = list(_ANSWERED_CALL.finditer(response))
    answered = {call.end() for call in calls}
    for result in _RESULT.finditer(response):
        if result.end() not in answered:
            before = response[max(0, result.start() - 30) : result.start()]
            raise DataError(f"expected <tool>...</tool> directly before each <result>, found {before!r}; mend it")
    return calls


def _parse(line: str, where: str) -> Demonstration:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg}") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    response = row.get("response") if isinstance(row, dict) else None
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(message, dict) and _is_message(message) for message in messages)
    ):
        raise DataError(f'{where}: "messages" must be a list of {{"role": "...", "content": "..."}}')
    if not isinstance(response, str) or not response:
        raise DataError(f'{where}: "response" must be text')
    try:
        answered_calls(response)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return Demonstration(messages, split_results(response))


def _is_message(message: dict[str, object]) -> bool:
    return all(isinstance(message.get(name), str) for name in ("role", "content"))
