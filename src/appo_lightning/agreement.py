"""All processes of a run go on, or all stop: none waits for one that has failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from appo_lightning.errors import AppoError, RanksStopped, SamplerError
from appo_lightning.metrics import of_all_ranks


class Agreement:
    """Points that all ranks pass in the same order, each telling the others whether it is well.

    Between two points ranks work alone: they sample, call tools and score rewards. A collective operation, which would
    wait for ever for a rank that is gone, begins with a point. Without other processes nothing happens.

    Args:
        world_size: processes of the run.
    """

    def __init__(self, world_size: int) -> None:
        self._alone = world_size == 1
        self._inside = False  # a collective operation: what fails there cannot be told by another one

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Around an operation of all ranks together.

        Raises:
            AppoError: another rank has failed.
        """
        self._pass(None)
        self._inside = True
        yield
        self._inside = False

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around all that a rank does until its next step of training.

        Raises:
            RanksStopped: the sampler of some rank has failed; raised on every rank.
            AppoError: another rank has failed otherwise.
        """
        try:
            yield
        except Exception as error:
            # Where a point has stopped this rank, the others know already.
            if not (self._inside or isinstance(error, _Told)):
                self._pass(error)
            raise
        self._pass(None)

    def _pass(self, error: Exception | None) -> None:
        if self._alone:
            return
        own = None if error is None else (isinstance(error, SamplerError), _told(error))
        for rank, failure in enumerate(of_all_ranks(own)):
            if failure is None:
                continue
            of_sampler, message = failure
            line = f"rank {rank}: {message}"
            if of_sampler:
                raise _SamplerTold(line) from error
            if error is None:
                raise _Told(line)
            return  # its own error says more


class _Told(AppoError):
    """Another rank has failed."""


class _SamplerTold(RanksStopped, _Told):
    """The sampler of a rank has failed, and all ranks know."""


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, AppoError) else f"{type(error).__name__}: {error}"
