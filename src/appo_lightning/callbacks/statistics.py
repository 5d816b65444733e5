"""What rollouts, branches and credit look like, under stable TensorBoard names (docs/tensorboard.md)."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import lightning as L
import numpy as np
from torch import Tensor

from appo_lightning.batching import ProcedureBatch
from appo_lightning.datamodule import RolloutDataModule
from appo_lightning.errors import ConfigurationError
from appo_lightning.metrics import MetricSums, log_metrics, tell_trainer, tensorboard_writer
from appo_lightning.reports.text import most_telling, render_tree
from appo_lightning.rollout.runner import PhaseRunner, PhaseTimes
from appo_lightning.rollout.tree import rewards_of
from appo_lightning.types import RolloutTree, StopReason


class RolloutStatistics(L.Callback):
    """Rewards, lengths, entropies, seconds of each part of a step, and sample rollouts as text.

    The last sample is also written to ``rollout_sample.txt`` in the log directory.

    Args:
        text_every: mini-batches between two sample rollouts; 0 writes none.
    """

    def __init__(self, text_every: int = 10) -> None:
        if text_every < 0:
            raise ConfigurationError(f"rollout_statistics.text_every must be at least 0, got {text_every}")
        self.text_every = text_every
        self._last_end = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_end = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: ProcedureBatch,
        batch_idx: int,
    ) -> None:
        roots = [root for tree in batch.trees for root in tree.roots]
        metrics = MetricSums()
        unscored = sum(tree.unscored for tree in batch.trees)
        sampled = unscored + sum(len(tree.roots) + len(tree.branches) for tree in batch.trees)
        metrics.add_sum("rollout/unscored_share", unscored, sampled)
        metrics.add("rollout/reward", [r.reward for r in roots if r.reward is not None], histogram=True)
        metrics.add("rollout/success", [float(r.success or 0) for r in roots])
        for name in {name: None for root in roots for name in root.reward_parts}:
            parts = [root.reward_parts[name] for root in roots if name in root.reward_parts]
            metrics.add(f"rollout/reward_{name}", parts)
        reasons = Counter(root.stop_reason for root in roots)
        for reason in get_args(StopReason):  # all of them: another rank may have what this one has not
            if reason != "late":  # they have left their groups
                metrics.add_sum(f"rollout/stop_share_{reason}", reasons[reason], len(roots))
        metrics.add("rollout/response_tokens", [len(r.response_ids) for r in roots], histogram=True)
        metrics.add("rollout/sampled_tokens", [r.num_sampled for r in roots])
        spread = [_std([r.reward or 0.0 for r in tree.roots]) for tree in batch.trees]
        metrics.add("rollout/group_reward_std", spread)
        metrics.add("rollout/equal_groups", [float(value == 0) for value in spread])
        metrics.add("policy/entropy", _at(batch.mask)(batch.entropies))
        self._add_phase(trainer, metrics, batch)
        now = time.monotonic()
        metrics.add("time/step", now - self._last_end)  # from the end of one mini-batch to the end of the next
        self._last_end = now
        means = log_metrics(trainer, metrics)
        tell_trainer(trainer, "reward", means.get("rollout/reward", 0.0))
        if self.text_every and batch_idx % self.text_every == 0:
            directory = trainer.log_dir  # collective
            if trainer.is_global_zero and batch.trees:
                self._write_text(trainer, batch, directory)

    def _add_phase(self, trainer: L.Trainer, metrics: MetricSums, batch: ProcedureBatch) -> None:
        data: RolloutDataModule = trainer.datamodule  # type: ignore[attr-defined]
        runner: PhaseRunner | None = data.source.runner if data.source is not None else None
        if runner is None or data.source is None or data.source.phase is None:
            return
        times, runner.times = runner.times, PhaseTimes()
        for name in PhaseTimes.__slots__:
            metrics.add(f"time/{name}", getattr(times, name))
        statistics = runner.loop.take_statistics()
        metrics.add("time/engine_restarts", statistics.restarts)
        if statistics.sampled_tokens:
            metrics.add_sum("time/sampled_tokens_per_second", statistics.sampled_tokens, statistics.seconds)
            metrics.add_sum("time/tool_wait_share", statistics.waiting_seconds, statistics.seconds)
            metrics.add_sum("rollout/cached_token_share", statistics.cached_tokens, statistics.prompt_tokens)
        if data.rollout.patience_s is not None:
            metrics.add("rollout/late_rollouts", statistics.late)
        if data.branching.max_refills:
            metrics.add("rollout/refilled_prompts", sum(data.source.phase.refills))
        gap = data.source.measure_gap(batch)
        metrics.add_all(
            {
                "sync/logprob_gap_mean": gap.mean,
                "sync/logprob_gap_rms": gap.rms,
                "sync/logprob_gap_max": gap.maximum,
            }
        )

    def _write_text(self, trainer: L.Trainer, batch: ProcedureBatch, directory: str | None) -> None:
        module: Any = trainer.lightning_module
        text = render_tree(most_telling(batch.trees), module.policy.tokenizer)
        for logger in trainer.loggers:
            writer = tensorboard_writer(logger)
            if writer is not None:
                writer.add_text("rollout/sample", f"```\n{text}\n```", trainer.global_step)
        if directory is not None:
            path = Path(directory) / "rollout_sample.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"step {trainer.global_step}\n{text}\n")


class BranchStatistics(L.Callback):
    """Where branches start and what they earn."""

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: ProcedureBatch,
        batch_idx: int,
    ) -> None:
        data: RolloutDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if not data.branching.num_branches:
            return
        metrics = MetricSums()
        metrics.add("branch/count", [len(tree.branches) for tree in batch.trees])
        wanted = data.branching.num_branches * len(batch.trees)
        metrics.add_sum("branch/filled_share", sum(len(tree.branches) for tree in batch.trees), wanted)
        metrics.add("branch/prompts_without", [float(not tree.branches) for tree in batch.trees])
        if data.branching.uses_gain:
            metrics.add("branch/fallback_fraction", batch.fallback)
        metrics.add("branch/score", batch.branch_score, histogram=True)
        _add_branches(metrics, batch.trees)
        log_metrics(trainer, metrics)


def _add_branches(metrics: MetricSums, trees: Sequence[RolloutTree]) -> None:
    """Where branches start, and what they earn beside their root."""
    branches = [branch for tree in trees for branch in tree.branches]
    roots = [tree.roots[branch.point.root] for tree in trees for branch in tree.branches]
    points, continuations = [branch.point for branch in branches], [branch.trajectory for branch in branches]
    metrics.add("branch/entropy_z", [point.entropy_z for point in points], histogram=True)
    metrics.add("branch/future_value_z", [point.future_value_z for point in points], histogram=True)
    lengths = [max(1, len(root.response_ids) - 1) for root in roots]
    places = [point.position / length for point, length in zip(points, lengths, strict=True)]
    metrics.add("branch/relative_position", places, histogram=True)
    distances = [
        min(abs(point.position - edge) for call in root.tool_calls for edge in (call.output_start, call.output_stop))
        for point, root in zip(points, roots, strict=True)
        if root.tool_calls
    ]
    metrics.add("branch/distance_to_tool_call", distances, histogram=True)
    rewards, of_roots = rewards_of(continuations), rewards_of(roots)
    metrics.add("branch/reward", rewards)
    metrics.add("branch/root_reward", of_roots)
    metrics.add("branch/reward_minus_root", [own - root for own, root in zip(rewards, of_roots, strict=True)])
    metrics.add("branch/continuation_tokens", [continuation.num_sampled for continuation in continuations])
    outcomes: dict[tuple[int, int], list[float]] = {}
    for root, point, of_root, own in zip(roots, points, of_roots, rewards, strict=True):
        outcomes.setdefault((id(root), point.position), [of_root]).append(own)
    # The root itself is one continuation of each of its branch points.
    metrics.add("branch/outcome_variance", [_std(outcome) ** 2 for outcome in outcomes.values()])


class CreditStatistics(L.Callback):
    """How credit is distributed over tokens."""

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: ProcedureBatch,
        batch_idx: int,
    ) -> None:
        metrics = MetricSums()
        trained = _at(batch.mask)
        if batch.advantages is not None:
            advantages = trained(batch.advantages)
            metrics.add("credit/advantage", _sample(advantages), histogram=True)
            metrics.add("credit/advantage_abs", np.abs(advantages))
            metrics.add_sum("credit/nonzero_fraction", int(np.count_nonzero(advantages)), advantages.size)
        if batch.influence is not None:
            metrics.add("credit/influence", _sample(trained(batch.influence)), histogram=True)
        gain = trained(batch.current_logprobs) - trained(batch.old_logprobs)
        metrics.add("credit/likelihood_gain_abs", np.abs(gain))
        if len(batch.branch_root):
            metrics.add_sum("credit/roots_with_branches", len(set(batch.branch_root.tolist())), batch.num_roots)
        log_metrics(trainer, metrics)


def _at(mask: Tensor) -> Callable[[Tensor], np.ndarray]:
    """Cuts out what stands under a mask. NumPy: five times as fast as torch's index on a CPU."""
    chosen = mask.cpu().numpy()
    return lambda values: values.cpu().numpy()[chosen]


def _sample(values: np.ndarray, limit: int = 4096) -> np.ndarray:
    """At most ``limit`` values, evenly spaced: a histogram needs no more."""
    return values[:: max(1, -(-len(values) // limit))]


def _std(values: Sequence[float]) -> float:
    """Population standard deviation, exactly 0 where all values are equal."""
    if not values or min(values) == max(values):
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
