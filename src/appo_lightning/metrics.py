"""Means and histograms of one step, gathered over ranks and written to the logger in one call."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

Values = Iterable[float | bool | int] | Tensor | np.ndarray | float


class MetricSums:
    """Named sums and counts; a mean over ranks is a mean over their values, however many each rank has."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._samples: dict[str, list[np.ndarray]] = {}
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
            values = values.detach().float().cpu().numpy()
        if isinstance(values, np.ndarray):
            total, count = float(values.sum(dtype=np.float64)), values.size
        else:  # an array of a few numbers would cost more than all of their arithmetic
            values = list(map(float, values)) if isinstance(values, Iterable) else [float(values)]
            total, count = sum(values), len(values)
        if count == 0:
            return
        self.add_sum(name, total, count)
        if histogram:
            self._samples.setdefault(name, []).append(np.ravel(values))

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
        parts = of_all_ranks(self._parts())
        if len(parts) == 1:
            return self
        merged = MetricSums()
        for part in parts:
            for name, (total, count) in part["sums"].items():
                merged.add_sum(name, total, count)
            for name, arrays in part["samples"].items():
                merged._samples.setdefault(name, []).extend(arrays)
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
            steps = statistics.quantiles(values * 2 if len(values) == 1 else values, n=20, method="inclusive")
            means |= {f"{name}_p50": steps[9], f"{name}_p95": steps[18]}
        for name, (first, second) in self._differences.items():
            if first in means and second in means:
                means[name] = means[first] - means[second]
        return means

    def count(self, name: str) -> float:
        """Number of values behind a mean."""
        return self._sums.get(name, (0.0, 0.0))[1]

    def samples(self) -> dict[str, np.ndarray]:
        """Values kept for histograms."""
        return {name: np.concatenate(arrays) for name, arrays in self._samples.items()}


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
    logger: TensorBoardLogger, means: Mapping[str, float], samples: Mapping[str, np.ndarray], step: int
) -> None:
    """Everything as one event. Lightning makes one of each number, and waits for the thread that writes after ten."""
    from lightning.fabric.utilities.logger import _add_prefix
    from tensorboard.compat.proto.summary_pb2 import Summary

    named = _add_prefix(means, logger._prefix, logger.LOGGER_JOIN_CHAR)
    told = [Summary.Value(tag=name, simple_value=value) for name, value in named.items()]
    for name, values in samples.items():
        told.append(Summary.Value(tag=f"{name}_distribution", histo=_histogram(values)))
    logger.experiment._get_file_writer().add_summary(Summary(value=told), step)


@functools.cache
def _bin_limits() -> np.ndarray:
    """Right ends of TensorBoard's bins: each a tenth wider than the one nearer to 0."""
    positive = 1e-12 * 1.1 ** np.arange(774)
    return np.concatenate([-positive[::-1], [0.0], positive])


def _histogram(values: np.ndarray) -> HistogramProto:
    """The values in TensorBoard's bins; stretches of empty ones as one. torch writes hundreds between -1 and 1."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    numbers, limits = np.sort(values).astype(np.float64), _bin_limits()
    counts = np.diff(numbers.searchsorted(limits))
    kept = counts > 0
    kept[:-1] |= kept[1:]  # an empty bin ends where one with values begins
    return HistogramProto(
        min=numbers[0],
        max=numbers[-1],
        num=len(numbers),
        sum=numbers.sum(),
        sum_squares=numbers.dot(numbers),
        bucket_limit=limits[1:][kept].tolist(),
        bucket=counts[kept].tolist(),
    )


def tell_trainer(trainer: L.Trainer, name: str, value: float) -> None:
    """Show a number in the progress bar and let callbacks monitor it, like ``LightningModule.log``.

    That keeps a metric of torchmetrics for it and takes 2 ms, of a step of the quick start a thousandth.
    """
    trainer.progress_bar_metrics[name] = value
    trainer.callback_metrics[name] = torch.tensor(value)


def tensorboard_writer(logger: Any) -> Any | None:
    """The SummaryWriter of a TensorBoard logger; None for other loggers."""
    from lightning.pytorch.loggers import TensorBoardLogger

    return logger.experiment if isinstance(logger, TensorBoardLogger) else None
