"""Pushes the trainer's weights into the sampler and proves that they arrived."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

import lightning as L
import torch

from appo_lightning.batching import pad_trajectories
from appo_lightning.datamodule import RolloutDataModule
from appo_lightning.errors import ConfigurationError, WeightSyncError
from appo_lightning.metrics import MetricSums, log_metrics, of_all_ranks
from appo_lightning.module import AppoModule
from appo_lightning.rollout.phase import LogprobGap
from appo_lightning.samplers.base import SampleRequest, generate
from appo_lightning.samplers.read_back import ReadBack
from appo_lightning.types import Trajectory

# Mean absolute difference, nats, that numerics explain; stale weights give 0.1 and more after a few steps of training
# from scratch, and a forgotten repack of a tied head 1 and more.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
# Fills a block of the prefix cache, so that one that outlived a push is noticed, and is cheap.
_CANARY_LENGTH = 33


class SamplerWeightSync(L.Callback):
    """Before anything is sampled, gives the sampler the current weights; then checks that they arrived, three times.

    Columns of every weight are read back from what the sampler computes with, and must be what was pushed to the last
    bit. A canary: the sampler continues fixed prompts, the trainer scores the same tokens, and the two must agree.
    And the roots of a phase, which the trainer scores anyway, must agree in the same way.

    Args:
        lora: how adapters reach the sampler: "merge" folds them into the weights on the way, "adapter" hands them over
            as they are, to a sampler that computes with them (``VLLMSampler``).
        read_columns: columns read back of each weight; 0 turns this check off.
        canary_prompts: prompts of the canary; 0 turns it off.
        canary_tokens: tokens sampled per prompt.
        tolerance: largest mean absolute log-prob difference, nats; null chooses by the precision of policy, trainer
            and sampler.
    """

    def __init__(
        self,
        lora: Literal["merge", "adapter"] = "merge",
        read_columns: int = 4,
        canary_prompts: int = 2,
        canary_tokens: int = 1,
        tolerance: float | None = None,
    ) -> None:
        if read_columns < 0:
            raise ConfigurationError(f"sync.read_columns must be at least 0, got {read_columns}")
        if canary_prompts < 0 or canary_tokens < 1:
            raise ConfigurationError(
                f"sync.canary_prompts must be at least 0 and canary_tokens at least 1, "
                f"got {canary_prompts} and {canary_tokens}"
            )
        if tolerance is not None and not 0 < tolerance < math.inf:
            raise ConfigurationError(f"sync.tolerance must be a positive number or null, got {tolerance}")
        self.lora, self.read_columns = lora, read_columns
        self.canary_prompts, self.canary_tokens, self.tolerance = canary_prompts, canary_tokens, tolerance
        self._pushed: tuple[int, int] | None = None  # engine, and the weights version that it holds
        self._metrics = MetricSums()
        self._prompts: list[list[int]] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, RolloutDataModule):
            raise ConfigurationError(f"SamplerWeightSync needs a RolloutDataModule, got {type(data).__name__}")
        assert isinstance(pl_module, AppoModule)
        lora = pl_module.policy_options.lora
        if self.lora == "adapter":
            if lora is None:
                raise ConfigurationError("sync.lora: adapter has no effect without adapters: set model.policy.lora")
            data.sampler.expect_adapter(lora.rank)
        data.push_weights, data.check_gap = self.push_if_moved, self.check_gap
        self._data = data
        self._pushed = None  # a checkpoint may have been restored since

    def push_if_moved(self, *, alone: bool = False) -> None:
        """Wake the sampler; push and check, if the trainer's weights moved since the last push or were lost in sleep.

        Args:
            alone: this process's sampler only; otherwise collective.

        Raises:
            WeightSyncError: the sampler does not compute with the trainer's weights.
        """
        module, sampler = self._data.module, self._data.sampler
        wanted = (self._data.engines, module.weights_version)
        kept = sampler.wake()
        if kept and self._pushed == wanted:
            return
        started = time.monotonic()
        read_back = ReadBack(self.read_columns, seed=module.weights_version)
        if self.lora == "merge":
            sampler.load_weights(read_back.noting(module.policy.named_weights()))
        else:
            if self._pushed is None or self._pushed[0] != self._data.engines:
                # A new engine has the weights below the adapter from the checkpoint: are they the trainer's?
                for _ in read_back.noting(module.policy.named_weights(merge=False)):
                    pass
            sampler.load_adapter(read_back.noting(module.policy.named_adapter()))
        pushed = time.monotonic()
        self._pushed = wanted
        self._metrics.add("sync/push_seconds", pushed - started)
        self._raise_for(self._problem(module, read_back), alone)
        self._metrics.add("sync/check_seconds", time.monotonic() - pushed)

    def check_gap(self, gap: LogprobGap) -> None:
        """Compare sampler and trainer on the roots of a phase, before anything is learnt from them.

        Raises:
            WeightSyncError: they differ by more than numerics explain.
        """
        problem = self._gap_problem("on the roots of this phase", gap.mean, gap.maximum)
        if problem is not None:
            raise WeightSyncError(problem)

    def _problem(self, module: AppoModule, read_back: ReadBack) -> str | None:
        """What is wrong with the weights that this process's sampler holds, if anything."""
        problem = None
        if self.read_columns:
            result = read_back.compare(self._data.sampler)
            self._metrics.add_sum("sync/checked_share", result.checked, result.checked + result.unchecked)
            if result.different:
                problem = (
                    f"after a weight push the sampler holds other numbers than the trainer in {len(result.different)} "
                    f"of {result.checked} weights, {min(result.different)} among them: it would sample from another "
                    "policy"
                )
        if self.canary_prompts and self._data.sampler.provides_logprobs:
            canary_problem = self._canary_problem(module)  # in any case: sharded, the forward pass needs all ranks
            problem = problem or canary_problem
        return problem

    def _raise_for(self, problem: str | None, alone: bool) -> None:
        # Every rank has its own engine; all fail together, or the others would wait for the one that did.
        problems = [problem] if alone else of_all_ranks(problem)
        for rank, found in enumerate(problems):
            if found is not None:
                raise WeightSyncError(found if len(problems) == 1 else f"rank {rank}: {found}")

    def _canary_problem(self, module: AppoModule) -> str | None:
        data = self._data
        prompts = self._canary_prompts()
        # The most likely token: in half precision the log-prob of an unlikely one may be far off, and these are few.
        requests = [
            SampleRequest(i, prompt, self.canary_tokens, seed=0, temperature=0.0) for i, prompt in enumerate(prompts)
        ]
        completions = generate(data.sampler, requests)
        rows = pad_trajectories(
            [
                Trajectory(prompt, c.token_ids, [True] * len(c.token_ids), c.logprobs, [], "length", 0)
                for prompt, c in zip(prompts, completions, strict=True)
            ]
        ).to(module.device)
        with module.scoring():  # as one batch, not through module.score: one rank may be here alone
            scored = module.policy.score(rows.token_ids, rows.lengths, mask=rows.mask)
        sampled = torch.tensor([logprob for c in completions for logprob in c.logprobs])
        gaps = (scored.logprobs[rows.mask].cpu() - sampled).abs()
        self._metrics.add("sync/canary_gap", gaps.mean())
        if completions[0].cached_tokens:  # later ones may share their beginning with the first
            return (
                f"after a weight push the sampler took {completions[0].cached_tokens} tokens from its prefix cache, "
                "which belongs to the old weights"
            )
        return self._gap_problem("after a weight push", float(gaps.mean()), float(gaps.max()))

    def _canary_prompts(self) -> list[list[int]]:
        data = self._data
        if not self._prompts:
            source = data.validation if len(data.validation) else data.train
            room = data.rollout.max_prompt_tokens + data.rollout.max_response_tokens - self.canary_tokens
            length = min(_CANARY_LENGTH, room)
            for index in range(min(self.canary_prompts, len(source))):
                prompt = data.task(source, index).prompt_ids
                # The end of a prompt: beginnings are often the same system prompt.
                self._prompts.append((prompt * math.ceil(length / len(prompt)))[-length:])
        return self._prompts

    def _gap_problem(self, when: str, mean: float, largest: float) -> str | None:
        limit = self.tolerance if self.tolerance is not None else _TOLERANCE[self._precision(self._data.module)]
        if mean <= limit:  # not so for NaN
            return None
        return (
            f"{when} the sampler's log-probs differ from the trainer's by {mean:.3g} nats on average "
            f"(limit {limit:g}): the sampler does not compute with the trainer's weights. Largest difference "
            f"{largest:.3g}. If the two only differ in precision, raise sync.tolerance"
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
        if self._data.source is not None and self._data.source.phase is not None:
            self._data.source.measure_gap(batch)  # before this step is saved, where it was not known before it
        metrics, self._metrics = self._metrics, MetricSums()
        log_metrics(trainer, metrics)
