"""The embedded world as a task source."""

from __future__ import annotations

from collections.abc import Sequence

from appo_lightning.errors import ConfigurationError
from appo_lightning.tasks.base import TaskSource
from appo_lightning.tasks.lookup.world import Episode, Split, check_hops, draw_episode
from appo_lightning.types import TaskRow


class LookupTasks(TaskSource):
    """Questions about a knowledge base that is new in every episode; for quick starts and tests.

    Each row carries its private corpus in ``metadata["documents"]`` and its difficulty in ``metadata["hops"]``, the
    number of tool calls of the shortest solution.

    Args:
        split: ``train`` or ``validation``; no episode belongs to both, whatever the seeds.
        size: number of questions.
        seed: another seed gives other questions.
        hops: weights of questions of 1, 2, ... hops (five at most): 1 looks up an attribute of a person, 2 an attribute
            of a person's city, 3 the sum or difference of two attributes, 4 and 5 the same through one or both cities.
    """

    def __init__(
        self,
        split: Split = "train",
        size: int = 10_000,
        seed: int = 0,
        hops: Sequence[float] = (1, 1, 1, 1),
    ) -> None:
        if split not in ("train", "validation"):
            raise ConfigurationError(f"split must be 'train' or 'validation', got {split!r}")
        if size < 1:
            raise ConfigurationError(f"size must be at least 1, got {size}")
        self.split: Split = split
        self.size = size
        self.seed = seed
        self.hops = check_hops(hops)

    def __len__(self) -> int:
        return self.size

    def episode(self, index: int) -> Episode:
        """The episode behind ``row(index)``."""
        if not 0 <= index < self.size:
            raise IndexError(f"index must be in range({self.size}), got {index}")
        return draw_episode(self.seed, self.split, index, self.hops)

    def row(self, index: int) -> TaskRow:
        return task_row(self.episode(index))


def task_row(episode: Episode) -> TaskRow:
    """The episode as a question for a policy."""
    return TaskRow(
        id=episode.id,
        messages=[{"role": "user", "content": episode.question}],
        references=(episode.answer,),
        metadata={"documents": episode.documents, "hops": episode.hops},
    )
