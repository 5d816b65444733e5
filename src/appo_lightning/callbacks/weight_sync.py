"""Pushes the trainer's weights into the sampler and proves that they arrived."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning as L
import torch

from appo_lightning.datamodule import RolloutDataModule
from appo_lightning.errors import ConfigurationError, WeightSyncError
from appo_lightning.metrics import MetricSums, log_metrics, of_all_ranks
from appo_lightning.module import AppoModule
from appo_lightning.samplers.base import SampleRequest, generate
from appo_lightning.types import Trajectory

# Mean absolute difference, nats, that numerics explain; stale weights give 0.1 and more after a few steps of training
# from scratch, and a forgotten repack of a tied head 1 and more.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


class SamplerWeightSync(L.Callback):
    """Before anything is sampled, gives the sampler the current weights; then checks a canary.

    The canary: the engine samples a few tokens from fixed prompts, the trainer scores the same tokens, and the two
    must agree.

    Args:
        canary_prompts: prompts of the check; 0 turns it off.
        canary_tokens: tokens sampled per prompt.
        tolerance: largest mean absolute log-prob difference, nats; null chooses by the precision of policy, trainer
            and sampler.
    """

    def __init__(self, canary_prompts: int = 2, canary_tokens: int = 8, tolerance: float | None = None) -> None:
        if canary_prompts < 0 or canary_tokens < 1:
            raise ConfigurationError(
                f"sync.canary_prompts must be at least 0 and canary_tokens at least 1, "
                f"got {canary_prompts} and {canary_tokens}"
            )
        if tolerance is not None and not 0 < tolerance < math.inf:
            raise ConfigurationError(f"sync.tolerance must be a positive number or null, got {tolerance}")
        self.canary_prompts, self.canary_tokens, self.tolerance = canary_prompts, canary_tokens, tolerance
        self._pushed: tuple[int, int] | None = None  # engine, and the weights version that it holds
        self._metrics = MetricSums()
        self._prompts: list[list[int]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, RolloutDataModule):
            raise ConfigurationError(f"SamplerWeightSync needs a RolloutDataModule, got {type(data).__name__}")
        data.push_weights = self.push_if_moved
        self._data = data
        self._pushed = None  # a checkpoint may have been restored since

    def push_if_moved(self) -> None:
        """Push and check, if the trainer's weights moved since the last push. Collective under sharding.

        Raises:
            WeightSyncError: the sampler's log-probs differ from the trainer's.
        """
        module = self._data.module
        wanted = (self._data.engines, module.weights_version)
        if self._pushed == wanted:
            return
        started = time.monotonic()
        self._data.sampler.load_weights(module.policy.named_weights())
        pushed = time.monotonic()
        self._pushed = wanted
        self._metrics.add("sync/push_seconds", pushed - started)
        if self.canary_prompts:
            self._check_canary(module)
            self._metrics.add("sync/canary_seconds", time.monotonic() - pushed)

    def _check_canary(self, module: AppoModule) -> None:
        data = self._data
        if not data.sampler.provides_logprobs:
            return
        if not self._prompts:
            source = data.validation if len(data.validation) else data.train
            self._prompts = [
                data.task(source, index).prompt_ids for index in range(min(self.canary_prompts, len(source)))
            ]
        temperature = data.rollout.temperature
        requests = [
            SampleRequest(i, prompt, self.canary_tokens, seed=i, temperature=temperature)
            for i, prompt in enumerate(self._prompts)
        ]
        trajectories = [
            Trajectory(prompt, c.token_ids, [True] * len(c.token_ids), c.logprobs, [], "length", 0)
            for prompt, c in zip(self._prompts, generate(data.sampler, requests), strict=True)
        ]
        scored = module.score(trajectories, temperature=temperature)
        gaps = torch.cat(
            [(s.logprobs - torch.tensor(t.behaviour_logprobs)).abs() for s, t in zip(scored, trajectories, strict=True)]
        )
        self._metrics.add("sync/canary_gap", gaps.mean())
        limit = self.tolerance if self.tolerance is not None else _TOLERANCE[self._precision(module)]
        # Every rank has its own engine; all fail together, or the others would wait for the one that did.
        for rank, (gap, largest) in enumerate(of_all_ranks((float(gaps.mean()), float(gaps.max())))):
            # A NaN must fail too.
            if not gap <= limit:
                where = f" on rank {rank}" if data.trainer is not None and data.trainer.world_size > 1 else ""
                raise WeightSyncError(
                    f"after a weight push the sampler's log-probs differ from the trainer's by {gap:.3g} nats on "
                    f"average{where} (limit {limit:g}): the sampler does not hold the trainer's weights. Largest "
                    f"difference {largest:.3g}. If the two only differ in precision, raise sync.tolerance"
                )

    def _precision(self, module: AppoModule) -> str:
        """The coarsest of what computes the two log-probs."""
        computing = (
            module.policy_options.dtype,
            str(module.trainer.precision),
            str(getattr(self._data.sampler, "dtype", "")),
        )
        return "bfloat16" if any(name.startswith("bf") for name in computing) else "float32"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics, self._metrics = self._metrics, MetricSums()
        log_metrics(trainer, metrics)
