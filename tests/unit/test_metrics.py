"""Claims about means: over values, whoever holds them."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from appo_lightning import metrics as module
from appo_lightning.metrics import MetricSums, log_metrics, tell_trainer


def test_a_mean_is_over_values_however_they_came():
    metrics = MetricSums()
    metrics.add("m", [1, 2])
    metrics.add("m", 6.0)
    metrics.add("m", torch.tensor([[True, False]]))
    metrics.add("m", (value for value in [2.0]))
    # 1 + 2 + 6 + 1 + 0 + 2 over six values.
    assert metrics.means() == {"m": 2.0}
    assert metrics.count("m") == 6
    assert metrics.count("unknown") == 0


@pytest.mark.parametrize("nothing", [[], torch.zeros(0), iter(())])
def test_no_values_leave_no_trace(nothing):
    metrics = MetricSums()
    metrics.add("m", nothing, histogram=True)
    assert (metrics.means(), metrics.samples()) == ({}, {})


def test_ratios_are_sums_over_sums():
    metrics = MetricSums()
    metrics.add_sum("tokens_per_second", 10, 1)
    metrics.add_sum("tokens_per_second", 20, 4)
    metrics.add_sum("nothing", 0.0, 0.0)
    metrics.add_all({"a": 1.0, "b": 2.0})
    assert metrics.means() == {"tokens_per_second": 6.0, "a": 1.0, "b": 2.0}


def test_large_numbers_keep_their_last_digit():
    metrics = MetricSums()
    metrics.add("tokens", [2**24 + 1, 2**24 + 1])
    assert metrics.means() == {"tokens": 2.0**24 + 1}


def test_half_precision_and_gradients_are_no_trouble():
    metrics = MetricSums()
    metrics.add("m", torch.ones(3, dtype=torch.bfloat16, requires_grad=True))
    assert metrics.means() == {"m": 1.0}


def test_histograms_keep_the_values():
    metrics = MetricSums()
    metrics.add("m", [1.0, 2.0], histogram=True)
    metrics.add("m", 3.0)
    assert {name: values.tolist() for name, values in metrics.samples().items()} == {"m": [1.0, 2.0]}
    assert metrics.means() == {"m": 2.0}


def test_ranks_are_weighted_by_what_they_hold(monkeypatch):
    other = MetricSums()
    other.add("m", [5.0, 5.0, 5.0], histogram=True)
    other.add("only there", 2.0)
    other.add_percentiles("s", [3.0, 4.0, 5.0])
    other.add_difference("m minus there", "m", "only there")
    dist = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        get_world_size=lambda: 2,
        all_gather_object=lambda parts, own: parts.__setitem__(slice(None), [own, other._parts()]),
    )
    monkeypatch.setattr(module.torch, "distributed", dist)
    own = MetricSums()
    own.add("m", 1.0, histogram=True)
    own.add_percentiles("s", [1.0, 2.0])
    merged = own.gathered()
    # 95 % of the way from the first to the fifth of 1, 2, 3, 4, 5.
    percentiles = {"s_p50": 3.0, "s_p95": pytest.approx(4.8)}
    assert merged.means() == {"m": 4.0, "only there": 2.0, "m minus there": 2.0, **percentiles}
    assert merged.count("m") == 4
    assert {name: values.tolist() for name, values in merged.samples().items()} == {"m": [1.0, 5.0, 5.0, 5.0]}


def test_percentiles_and_differences_need_values():
    metrics = MetricSums()
    metrics.add_percentiles("s", [])
    metrics.add("a", 1.0)
    metrics.add_difference("a minus b", "a", "b")
    assert metrics.means() == {"a": 1.0}
    metrics.add_percentiles("s", [7.0])
    assert metrics.means() == {"a": 1.0, "s_p50": 7.0, "s_p95": 7.0}


@pytest.mark.parametrize("zero", [True, False])
def test_rank_zero_writes_and_every_rank_knows(zero):
    written: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda means, step: written.append((means, step)))
    trainer = SimpleNamespace(global_step=7, is_global_zero=zero, loggers=[logger])
    metrics = MetricSums()
    metrics.add("m", 2.0)
    assert log_metrics(trainer, metrics) == {"m": 2.0}  # type: ignore[arg-type]
    assert written == ([({"m": 2.0}, 7)] if zero else [])


def test_a_call_is_one_event_with_every_number_and_histogram(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="", prefix="p")
    metrics = MetricSums()
    metrics.add("m", [1.0, 2.0, 2.0], histogram=True)
    metrics.add("n", 5.0)
    log_metrics(SimpleNamespace(global_step=3, is_global_zero=True, loggers=[logger]), metrics)  # type: ignore[arg-type]
    logger.experiment.close()
    (path,) = tmp_path.glob("events*")
    header, event = EventFileLoader(str(path)).Load()
    assert header.HasField("file_version")
    assert event.step == 3
    told = EventAccumulator(str(path), purge_orphaned_data=False).Reload()
    assert {name: told.Scalars(name)[0].value for name in told.Tags()["scalars"]} == {
        "p-m": pytest.approx(5 / 3),
        "p-n": 5.0,
    }
    (shown,) = told.Histograms("m_distribution")
    assert (shown.step, shown.histogram_value.num, shown.histogram_value.sum) == (3, 3.0, 5.0)


@pytest.mark.parametrize("values", [[-1.0, 0.0, 0.0, 1.0], [3.0], [1e-3, 2e-3, 0.5, 40.0], [-7.5, -7.25]])
def test_a_histogram_has_the_bins_that_torch_gives_it_without_the_empty_ones(tmp_path, values):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    metrics = MetricSums()
    metrics.add("m", values, histogram=True)
    log_metrics(SimpleNamespace(global_step=0, is_global_zero=True, loggers=[logger]), metrics)  # type: ignore[arg-type]
    logger.experiment.add_histogram("torch", torch.tensor(values, dtype=torch.float64), 0)
    logger.experiment.close()
    told = EventAccumulator(str(tmp_path)).Reload()
    (own,), (torchs,) = told.Histograms("m_distribution"), told.Histograms("torch")

    def bins(shown):
        limits = shown.histogram_value.bucket_limit
        edges = zip([None, *limits], limits, shown.histogram_value.bucket, strict=False)
        return [pytest.approx(number) for edge in edges if edge[2] for number in edge]

    assert bins(own) == bins(torchs)
    assert len(own.histogram_value.bucket) <= 2 * len(set(values))
    for name in ("min", "max", "num", "sum", "sum_squares"):
        assert getattr(own.histogram_value, name) == getattr(torchs.histogram_value, name)


def test_what_the_trainer_is_told_can_be_monitored_and_is_shown(tmp_path):
    trainer = L.Trainer(logger=False, accelerator="cpu", default_root_dir=tmp_path, barebones=False)
    tell_trainer(trainer, "reward", 0.5)
    assert trainer.progress_bar_metrics == {"reward": 0.5}
    assert trainer.callback_metrics == {"reward": torch.tensor(0.5)}
