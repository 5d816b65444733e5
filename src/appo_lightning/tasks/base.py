"""The contract of a task source: numbered questions."""

from __future__ import annotations

from abc import ABC, abstractmethod

from appo_lightning.types import TaskRow


class TaskSource(ABC):
    """Questions by index. ``row(i)`` is a pure function of ``i`` and the constructor's arguments."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of questions."""

    @abstractmethod
    def row(self, index: int) -> TaskRow:
        """The question at ``index`` in ``range(len(self))``."""
