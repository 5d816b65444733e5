"""Questions and demonstrations of your own: how many days lie between two dates?"""

from __future__ import annotations

import random
from datetime import date, timedelta

from appo_lightning.tasks.base import TaskSource
from appo_lightning.tasks.demonstrations import Demonstration, DemonstrationSource, split_results
from appo_lightning.types import TaskRow


class DateTasks(TaskSource):
    """Questions about two dates.

    Args:
        size: number of questions.
        seed: another seed gives other questions.
    """

    def __init__(self, size: int = 1000, seed: int = 0) -> None:
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def row(self, index: int) -> TaskRow:
        first, last = self.dates(index)
        question = f"How many days are there between {first} and {last}?"
        return TaskRow(
            id=f"dates-{self.seed}-{index}",  # unique and stable: seeds are derived from it
            messages=[{"role": "user", "content": question}],
            references=(str((last - first).days),),
        )

    def dates(self, index: int) -> tuple[date, date]:
        """The two dates of a question: a function of the seed and the index, nothing else."""
        rng = random.Random(f"{self.seed}/{index}")
        first = date(2024, 1, 1) + timedelta(days=rng.randrange(366))
        return first, first + timedelta(days=rng.randrange(1, 100))


class DateDemonstrations(DemonstrationSource):
    """Solutions of ``DateTasks`` that call the tool ``days``, for the cold start.

    Args:
        size: number of demonstrations.
        seed: use another one than for training and validation.
        error_rate: share of the solutions that ask for a wrong date: what reinforcement learning has to repair.
    """

    def __init__(self, size: int = 1000, seed: int = 1, error_rate: float = 0.0) -> None:
        self._tasks = DateTasks(size, seed)
        self.error_rate = error_rate

    def __len__(self) -> int:
        return len(self._tasks)

    def demonstration(self, index: int) -> Demonstration:
        first, last = self._tasks.dates(index)
        rng = random.Random(f"demonstration/{index}")
        if rng.random() < self.error_rate:
            last += timedelta(days=rng.randrange(1, 10))
        days = abs((last - first).days)
        response = (
            f"<think> count</think><days>{first} {last}</days><result>{days}</result>"
            f"<think> answer</think><answer>\\boxed{{{days}}}</answer>"
        )
        # Text inside <result> is shown to the policy, and not trained on: a tool wrote it.
        return Demonstration(self._tasks.row(index).messages, split_results(response))


if __name__ == "__main__":
    row = DateTasks().row(0)
    print(row.messages[0]["content"], row.references)
    print(DateDemonstrations().demonstration(0).response)
