"""Mathematical answers: right if equivalent to a reference, whatever the notation."""

from __future__ import annotations

from collections.abc import Sequence

from appo_lightning.errors import ConfigurationError
from appo_lightning.rewards.equivalence import EquivalenceChecker
from appo_lightning.rewards.tagged import CallFormatName, TaggedReward


class MathReward(TaggedReward):
    """1 where the boxed answer is mathematically equivalent to a reference, by the tagged rule of ``TaggedReward``.

    Equivalence is that of the math-verify library, evaluated in a process of its own within a budget of CPU seconds:
    ``\\boxed{9^{9^{9}}}`` would keep sympy busy for ever. Beyond the budget an answer is wrong.
    For mathematics only: the library reads a word as a product of its letters, so "pairs" equals "Paris".

    Args:
        format_penalty: value of a response in broken format, <= 0.
        tool_bonus: added to a right answer, >= 0; 0 switches it off.
        bonus_tools: tools that must all have answered for the bonus.
        tools: tag names whose calls must be answered by a result; holds every bonus tool.
        timeout_seconds: CPU seconds for one comparison, > 0.
        max_answer_characters: longer answers are wrong without a comparison, >= 1.
        call_format: how calls are written: "tags", or "hermes" beside ``data.call_format: HermesFormat``.

    Raises:
        ConfigurationError: an option is out of range or has no effect.
    """

    grade_name = "accuracy"

    def __init__(
        self,
        format_penalty: float = -1.0,
        tool_bonus: float = 0.1,
        bonus_tools: Sequence[str] = ("search", "python"),
        tools: Sequence[str] = ("search", "python"),
        timeout_seconds: float = 3.0,
        max_answer_characters: int = 1000,
        call_format: CallFormatName = "tags",
    ) -> None:
        super().__init__(format_penalty, tool_bonus, bonus_tools, tools, call_format=call_format)
        if max_answer_characters < 1:
            raise ConfigurationError(f"max_answer_characters must be >= 1, got {max_answer_characters}: use 1000")
        self.max_answer_characters = max_answer_characters
        self._checker = EquivalenceChecker(timeout_seconds)

    def grade(self, answer: str, references: Sequence[str]) -> float:
        """Return 1.0 if the answer is equivalent to any reference, else 0.0."""
        if not answer.strip() or len(answer) > self.max_answer_characters:
            return 0.0
        return float(any(self._checker.equivalent(reference, answer) for reference in references))
