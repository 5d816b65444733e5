"""A reward of your own: near numbers earn something, tool calls cost something."""

from __future__ import annotations

from appo_lightning.errors import ConfigurationError
from appo_lightning.rewards.base import Reward, Score
from appo_lightning.rewards.tagged import read_tagged_response
from appo_lightning.types import Task

TOOLS = ("search", "python", "days")


class NearReward(Reward):
    r"""Grades the number in ``<answer>\boxed{...}</answer>`` by its distance to the reference.

    Args:
        tolerance: distance at which nothing is earned.
        call_cost: taken off for each tool call.
    """

    def __init__(self, tolerance: float = 10.0, call_cost: float = 0.02) -> None:
        if tolerance <= 0:
            raise ConfigurationError(f"tolerance must be positive, got {tolerance}")
        self.tolerance, self.call_cost = tolerance, call_cost

    def score(self, task: Task, response_text: str) -> Score:
        response = read_tagged_response(response_text, TOOLS)
        if response.violation is not None:
            return Score(-1.0, success=False, parts={"format": 0.0, "nearness": 0.0})
        distance = min(_distance(response.answer, reference) for reference in task.references)
        nearness = max(0.0, 1.0 - distance / self.tolerance)
        calls = sum(response_text.count(f"<{name}>") for name in TOOLS)
        value = nearness - self.call_cost * calls
        return Score(value, success=distance == 0, parts={"format": 1.0, "nearness": nearness})


def _distance(answer: str, reference: str) -> float:
    try:
        return abs(float(answer) - float(reference))
    except ValueError:  # a reward must not raise on any text
        return float("inf")


if __name__ == "__main__":
    question = Task(id="trial", prompt_ids=[], references=("29",))
    reward = NearReward()
    for answer in ("29", "27", "many"):
        text = (
            "<think>count</think><days>2024-02-01 2024-03-01</days><result>29</result>"
            f"<answer>\\boxed{{{answer}}}</answer>"
        )
        print(answer, reward.score(question, text))
    print("no tags", reward.score(question, "29"))
