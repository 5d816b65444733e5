"""How often tools are called, how long they take, and what a success costs in calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import lightning as L

from appo_lightning.batching import EvaluationBatch, ProcedureBatch
from appo_lightning.datamodule import RolloutDataModule
from appo_lightning.metrics import MetricSums, log_metrics
from appo_lightning.tools.base import Tool
from appo_lightning.types import ToolCall, ToolError, Trajectory


class ToolCallEfficiency(L.Callback):
    """Of all tools and of each: calls, failures by kind, seconds, and what they have to do with success."""

    def __init__(self) -> None:
        self._evaluation = MetricSums()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: ProcedureBatch,
        batch_idx: int,
    ) -> None:
        metrics = MetricSums()
        roots = [root for tree in batch.trees for root in tree.roots]
        add_tool_metrics(metrics, roots, _tool_names(trainer), prefix="tools")
        _add_counts(metrics, trainer, prefix="tools")
        branches = [branch.trajectory for tree in batch.trees for branch in tree.branches]
        mismatched = [any(call.state_matches is False for call in branch.tool_calls) for branch in branches]
        metrics.add("tools/replay_mismatch_rate", [float(found) for found in mismatched])
        log_metrics(trainer, metrics)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EvaluationBatch, *args: Any
    ) -> None:
        add_tool_metrics(self._evaluation, batch.trajectories, _tool_names(trainer), prefix="val_tools")
        _add_counts(self._evaluation, trainer, prefix="val_tools")

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: EvaluationBatch, *args: Any
    ) -> None:
        add_tool_metrics(self._evaluation, batch.trajectories, _tool_names(trainer), prefix="test_tools")
        _add_counts(self._evaluation, trainer, prefix="test_tools")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        metrics, self._evaluation = self._evaluation, MetricSums()
        log_metrics(trainer, metrics)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_validation_epoch_end(trainer, pl_module)


def _tools(trainer: L.Trainer) -> list[Tool]:
    data: RolloutDataModule = trainer.datamodule  # type: ignore[attr-defined]
    return data.tools


def _tool_names(trainer: L.Trainer) -> list[str]:
    return [tool.name for tool in _tools(trainer)]


def _add_counts(metrics: MetricSums, trainer: L.Trainer, *, prefix: str) -> None:
    """Add what the tools themselves counted since the last time: calls of branches, too."""
    for tool in _tools(trainer):
        counts = tool.take_counts()
        if "hits" in counts:
            metrics.add_sum(f"{prefix}/{tool.name}_cache_hit_rate", counts["hits"], counts["lookups"])
        if "retries" in counts:
            metrics.add_sum(f"{prefix}/{tool.name}_retries_per_call", counts["retries"], counts["lookups"])


def add_tool_metrics(
    metrics: MetricSums, trajectories: Sequence[Trajectory], names: Sequence[str], *, prefix: str
) -> None:
    """Add the tool metrics of some trajectories under ``prefix/``.

    Args:
        metrics: every rank adds the same names, so that means are over the trajectories of all ranks.
        trajectories: of this rank.
        names: of all tools.
        prefix: of the names.
    """
    calls = [call for trajectory in trajectories for call in trajectory.tool_calls]
    metrics.add(f"{prefix}/calls_per_trajectory", [len(t.tool_calls) for t in trajectories])
    metrics.add(f"{prefix}/trajectories_with_calls", [float(bool(t.tool_calls)) for t in trajectories])
    metrics.add(f"{prefix}/failure_rate", [float(not call.succeeded) for call in calls])
    metrics.add(f"{prefix}/seconds_per_call", [call.seconds for call in calls])
    for name in names:
        _add_one_tool(metrics, trajectories, name, prefix=f"{prefix}/{name}")
    _add_errors(metrics, calls, prefix=f"{prefix}/error")
    successes = sum(bool(trajectory.success) for trajectory in trajectories)
    metrics.add_sum(f"{prefix}/calls_per_success", len(calls), successes)
    for outcome, name in ((True, "successes"), (False, "failures")):
        group = [len(t.tool_calls) for t in trajectories if t.success is outcome]
        metrics.add(f"{prefix}/calls_in_{name}", group)


def _add_one_tool(metrics: MetricSums, trajectories: Sequence[Trajectory], name: str, *, prefix: str) -> None:
    calls = [call for trajectory in trajectories for call in trajectory.tool_calls if call.name == name]
    metrics.add_sum(f"{prefix}_calls_per_trajectory", len(calls), len(trajectories))
    metrics.add(f"{prefix}_failure_rate", [float(not call.succeeded) for call in calls])
    _add_errors(metrics, calls, prefix=f"{prefix}_error")
    metrics.add(f"{prefix}_result_tokens", [call.output_stop - call.output_start for call in calls])
    metrics.add(f"{prefix}_seconds_per_call", [call.seconds for call in calls])
    # A call that was refused never reached the tool: it says nothing about how long that takes.
    metrics.add_percentiles(f"{prefix}_seconds", [c.seconds for c in calls if c.error not in ("limit", "malformed")])
    metrics.add_sum(f"{prefix}_calls_per_success", len(calls), sum(bool(t.success) for t in trajectories))
    outcomes: dict[bool, list[bool]] = {True: [], False: []}  # by whether the tool was used
    for trajectory in trajectories:
        if trajectory.success is not None:
            outcomes[any(call.name == name for call in trajectory.tool_calls)].append(trajectory.success)
    metrics.add(f"{prefix}_success_with", outcomes[True])
    metrics.add(f"{prefix}_success_without", outcomes[False])
    metrics.add_difference(f"{prefix}_success_gain", f"{prefix}_success_with", f"{prefix}_success_without")


def _add_errors(metrics: MetricSums, calls: Sequence[ToolCall], *, prefix: str) -> None:
    kinds = Counter(call.error for call in calls)
    for error in get_args(ToolError):
        metrics.add_sum(f"{prefix}_{error}_rate", kinds[error], len(calls))
