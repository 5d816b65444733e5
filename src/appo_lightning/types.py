"""The values that flow from a question to a gradient.

Plain dataclasses, torch and the standard library only. Token positions count from the first response token unless a
field says otherwise. ``T`` is the number of response tokens of one trajectory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

ToolError = Literal["timeout", "error", "empty", "limit", "malformed"]
StopReason = Literal["eos", "length", "call_limit", "late"]  # late: not finished, see RolloutLimits.patience_s


@dataclass(slots=True)
class TaskRow:
    """One question as a task source gives it, before tokenisation."""

    id: str  # unique and stable: seeds are derived from it
    messages: list[dict[str, str]]  # chat messages: {"role": ..., "content": ...}
    references: tuple[str, ...]  # every accepted answer
    metadata: dict[str, Any] = field(default_factory=dict)  # "documents": corpus private to the episode


@dataclass(slots=True)
class Task:
    """One question, tokenised."""

    id: str
    prompt_ids: list[int]
    references: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    question: str = ""  # the last user message, for reports


@dataclass(slots=True)
class ToolCall:
    """One use of a tool inside a trajectory."""

    name: str
    argument: str
    result: str  # what the policy was shown, without the result tags
    output_start: int  # response position of the first token of the result
    output_stop: int  # response position after the last token of the result
    succeeded: bool
    seconds: float
    error: ToolError | None = None
    digest: str = ""  # of the whole answer, before it was cut; compared when the call is replayed; "": not compared
    state_matches: bool | None = None  # whether calls replayed for its state answered as recorded; None: none were


@dataclass(slots=True)
class Trajectory:
    """One rollout: what was sampled, what the tools answered, what it earned."""

    prompt_ids: list[int]
    response_ids: list[int]  # [T]
    sampled: list[bool]  # [T] True where the policy chose the token
    behaviour_logprobs: list[float]  # [T] nats at the sampling temperature; 0.0 where not sampled
    tool_calls: list[ToolCall]
    stop_reason: StopReason
    policy_version: int  # number of weight pushes before the first token was sampled
    response_text: str = ""  # decoded response, tags and tool results included
    reward: float | None = None  # None: not scored
    reward_parts: dict[str, float] = field(default_factory=dict)
    success: bool | None = None  # None: not scored

    @property
    def num_sampled(self) -> int:
        """Number of tokens that the policy chose."""
        return sum(self.sampled)


@dataclass(slots=True)
class BranchPoint:
    """A place in a root where a second continuation is sampled."""

    root: int  # row of the root
    position: int  # token position in the coordinates of the scored array
    score: float
    entropy_z: float = 0.0
    future_value_z: float = 0.0


@dataclass(slots=True)
class Branch:
    """A continuation sampled from a prefix of a root.

    ``trajectory.response_ids`` starts with the prefix; ``trajectory.sampled`` is False on it: those tokens belong to
    the root.
    """

    point: BranchPoint  # point.root counts the roots of the same tree
    trajectory: Trajectory
    prefix_length: int  # response tokens taken from the root


@dataclass(slots=True)
class RolloutTree:
    """Every rollout of one task."""

    task: Task
    roots: list[Trajectory]
    branches: list[Branch] = field(default_factory=list)
    unscored: int = 0  # rollouts that the reward could not score, and that are left out here
