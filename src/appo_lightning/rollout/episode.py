"""One trajectory in the making: its tokens, its calls, its tool sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from appo_lightning.rollout.formats.base import EncodedResult, ParsedCall
from appo_lightning.rollout.sessions import EpisodeSession, calls_to_replay
from appo_lightning.samplers.base import SampleRequest
from appo_lightning.tools.base import Tool
from appo_lightning.types import StopReason, Task, ToolCall, ToolError


@dataclass(slots=True)
class Prefix:
    """Where a rollout starts: a task, and for a branch the part of a root that it keeps."""

    task: Task
    seed: int
    response_ids: list[int] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)  # those whose result lies inside response_ids


@dataclass(slots=True)
class Answer:
    """What a call was answered with."""

    name: str
    argument: str
    text: str
    error: ToolError | None = None
    seconds: float = 0.0
    digest: str = ""  # see ToolCall
    state_matches: bool | None = None  # see ToolCall


class Episode:
    """A trajectory in the making."""

    def __init__(self, prefix: Prefix, index: int) -> None:
        self.prefix, self.index = prefix, index
        self.response_ids = list(prefix.response_ids)
        self.sampled = [False] * len(self.response_ids)
        self.logprobs = [0.0] * len(self.response_ids)
        self.tool_calls = list(prefix.tool_calls)
        self.turn_start = max((call.output_stop for call in self.tool_calls), default=0)
        self.turn = 0  # requests so far
        self.request: SampleRequest | None = None  # the last one
        self.finish: str | None = None
        self.stop_reason: StopReason | None = None
        self.unanswered: list[ParsedCall] = []  # calls of this turn that no tool has begun to answer
        self.pending: ParsedCall | None = None  # the one that a tool works on
        self.answers: list[Answer] = []  # to calls of this turn
        self._sessions: dict[str, EpisodeSession] = {}
        self._given_up: set[str] = set()  # tools whose state is lost

    @property
    def turn_ids(self) -> list[int]:
        """What the policy has written since the last result."""
        return self.response_ids[self.turn_start :]

    @property
    def num_calls(self) -> int:
        """Calls answered so far, those of this turn included."""
        return len(self.tool_calls) + len(self.answers)

    def append_results(self, results: Sequence[EncodedResult]) -> None:
        """Put the answers of this turn into the trajectory; the policy goes on after them."""
        for answer, result in zip(self.answers, results, strict=True):
            start = len(self.response_ids)
            self.response_ids += result.ids
            self.tool_calls.append(
                ToolCall(
                    name=answer.name,
                    argument=answer.argument,
                    result=result.shown,
                    output_start=start,
                    output_stop=len(self.response_ids),
                    succeeded=answer.error is None,
                    seconds=answer.seconds,
                    error=answer.error,
                    digest=answer.digest,
                    state_matches=answer.state_matches,
                )
            )
        added = len(self.response_ids) - len(self.sampled)
        self.sampled += [False] * added
        self.logprobs += [0.0] * added
        self.answers = []
        self.turn_start = len(self.response_ids)
        self.finish = None

    def session(self, tool: Tool) -> EpisodeSession:
        """This trajectory's own session of a tool."""
        if tool.name not in self._sessions:
            replay: list[ToolCall] = []
            if tool.stateful and tool.name not in self._given_up:
                replay = calls_to_replay(self.prefix.tool_calls, tool.name)
            self._sessions[tool.name] = EpisodeSession(tool, self.prefix.task, replay)
        return self._sessions[tool.name]

    def give_up_session(self, name: str) -> None:
        """The next call gets a new session, with no state."""
        self._given_up.add(name)
        self._sessions.pop(name).close()

    @property
    def has_sessions(self) -> bool:
        """Whether there is something to close."""
        return bool(self._sessions)

    def close(self) -> None:
        """Close all sessions; for any thread, once no tool is called any more."""
        while self._sessions:
            self._sessions.popitem()[1].close()
