"""Means and histograms of one step, gathered over ranks and written to the logger in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.loggers import TensorBoardLogger

Values = Iterable[float | bool | int] | Tensor | float


class MetricSums:
    """Named sums and counts; a mean over ranks is a mean over their values, however many each rank has."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._samples: dict[str, list[float]] = {}
        self._ranked: dict[str, list[float]] = {}
        self._differences: dict[str, tuple[str, str]] = {}

    def add(self, name: str, values: Values, *, histogram: bool = False) -> None:
        """Add values to the mean called ``name``; no values leave no trace.

        Args:
            name: the TensorBoard name.
            values: numbers.
            histogram: also keep them for a histogram.
        """
        if isinstance(values, Tensor):
            array = values.detach().float().cpu().numpy().ravel()
            total, count = float(array.sum(dtype=np.float64)), array.size
            numbers = array.tolist() if histogram else []
        else:  # a tensor of a few numbers would cost more than all of their arithmetic
            numbers = [float(value) for value in values] if isinstance(values, Iterable) else [float(values)]
            total, count = sum(numbers), len(numbers)
        if count == 0:
            return
        self.add_sum(name, total, count)
        if histogram:
            self._samples.setdefault(name, []).extend(numbers)

    def add_sum(self, name: str, total: float, count: float) -> None:
        """Add a ratio's numerator and denominator."""
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + total, old_count + count)

    def add_percentiles(self, name: str, values: Iterable[float]) -> None:
        """Add values to the percentiles ``name_p50`` and ``name_p95``; no values leave no trace."""
        if values := list(values):
            self._ranked.setdefault(name, []).extend(values)

    def add_difference(self, name: str, first: str, second: str) -> None:
        """Report the mean called ``first`` minus that called ``second``, where both exist on any rank."""
        self._differences[name] = (first, second)

    def add_all(self, values: Mapping[str, float]) -> None:
        """Add one value to each name."""
        for name, value in values.items():
            self.add_sum(name, value, 1.0)

    def gathered(self) -> MetricSums:
        """The sums of all ranks, on every rank. Collective."""
        merged = MetricSums()
        for part in of_all_ranks(self._parts()):
            for name, (total, count) in part["sums"].items():
                merged.add_sum(name, total, count)
            for name, values in part["samples"].items():
                merged._samples.setdefault(name, []).extend(values)
            for name, values in part["ranked"].items():
                merged.add_percentiles(name, values)
            merged._differences.update(part["differences"])
        return merged

    def _parts(self) -> dict[str, Any]:
        """What one rank tells the others."""
        return {
            "sums": self._sums,
            "samples": self._samples,
            "ranked": self._ranked,
            "differences": self._differences,
        }

    def means(self) -> dict[str, float]:
        """Mean, percentile or difference by name."""
        means = {name: total / count for name, (total, count) in self._sums.items() if count}
        for name, values in self._ranked.items():
            median, high = np.quantile(values, [0.5, 0.95]).tolist()
            means |= {f"{name}_p50": median, f"{name}_p95": high}
        for name, (first, second) in self._differences.items():
            if first in means and second in means:
                means[name] = means[first] - means[second]
        return means

    def count(self, name: str) -> float:
        """Number of values behind a mean."""
        return self._sums.get(name, (0.0, 0.0))[1]

    def samples(self) -> dict[str, list[float]]:
        """Values kept for histograms."""
        return self._samples


def of_all_ranks(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank. Collective; a list of one without other processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    if torch.distributed.get_world_size() == 1:
        return [value]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, value)
    return parts


def log_metrics(trainer: L.Trainer, sums: MetricSums, *, step: int | None = None) -> dict[str, float]:
    """Gather over ranks and write scalars, and histograms where the logger is TensorBoard. Collective.

    Returns:
        The means, on every rank.
    """
    merged = sums.gathered()
    means = merged.means()
    at = trainer.global_step if step is None else step
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if tensorboard_writer(logger) is None:
                logger.log_metrics(means, at)
            else:
                _write_event(logger, means, merged.samples(), at)  # type: ignore[arg-type]
    return means


def _write_event(
    logger: TensorBoardLogger, means: Mapping[str, float], samples: Mapping[str, list[float]], step: int
) -> None:
    """Everything as one event. Lightning makes one of each number, and waits for the thread that writes after ten."""
    from lightning.fabric.utilities.logger import _add_prefix
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard.summary import histogram

    writer = logger.experiment
    named = _add_prefix(means, logger._prefix, logger.LOGGER_JOIN_CHAR)
    event = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in named.items()])
    bins = np.asarray(writer.default_bins)
    for name, values in samples.items():
        event.MergeFrom(histogram(f"{name}_distribution", np.asarray(values, dtype=np.float32), bins))
    writer._get_file_writer().add_summary(event, step)


def tensorboard_writer(logger: Any) -> Any | None:
    """The SummaryWriter of a TensorBoard logger; None for other loggers."""
    from lightning.pytorch.loggers import TensorBoardLogger

    return logger.experiment if isinstance(logger, TensorBoardLogger) else None
