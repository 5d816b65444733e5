"""The contract of a reward: a task and a finished response in, a score out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from appo_lightning.types import Task


@dataclass(slots=True)
class Score:
    """What a response earned."""

    value: float | None  # the reward that trains; None: could not be scored, because a judge did not answer, say
    success: bool  # the answer is right, whatever the bonus; of no meaning without a value
    parts: dict[str, float] = field(default_factory=dict)  # named ingredients, logged one by one


class Reward(ABC):
    """Scores a finished response; must be deterministic and must not raise on any text.

    A rollout without a value leaves its group, which is then the smaller: it is never taken for a failure.

    Attributes:
        call_format: name of the call format that the reward reads in responses; None: it reads no calls.
    """

    call_format: str | None = None

    @abstractmethod
    def score(self, task: Task, response_text: str) -> Score:
        """Score the decoded response (tags and tool results included, special tokens removed)."""

    def __call__(self, task: Task, response_text: str) -> Score:
        """The same as ``score``."""
        return self.score(task, response_text)
