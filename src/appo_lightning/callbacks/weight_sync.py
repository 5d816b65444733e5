"""Pushes the trainer's weights into the sampler and proves that they arrived."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from appo_lightning.agreement import Agreement
from appo_lightning.batching import pad_trajectories
from appo_lightning.datamodule import RolloutDataModule
from appo_lightning.errors import AppoError, ConfigurationError, EngineFailure, WeightSyncError
from appo_lightning.metrics import MetricSums, log_metrics
from appo_lightning.module import AppoModule
from appo_lightning.rollout.phase import LogprobGap
from appo_lightning.rollout.watchdog import Watchdog
from appo_lightning.samplers.base import Completion, Precision, SampleRequest, generate
from appo_lightning.samplers.read_back import ReadBack, ReadBackResult
from appo_lightning.types import Trajectory

# Mean absolute difference, nats, that numerics explain; stale weights give 0.1 and more after a few steps of training
# from scratch, and a forgotten repack of a tied head 1 and more.
_TOLERANCE: dict[Precision, float] = {"float32": 1e-3, "tf32": 2e-2, "half": 0.1}
# Tokens of a prompt: on a new engine enough to tell how it counts positions; later so few that a product with a weight
# takes no longer than reading it.
_FIRST_CANARY, _CANARY = 33, 2


class SamplerWeightSync(L.Callback):
    """Before anything is sampled, gives the sampler the current weights; then checks that they arrived, three times.

    Columns of every weight are read back from what the sampler computes with, and must be what was pushed to the last
    bit; its prefix cache must be empty. A canary: the sampler continues a fixed prompt, the trainer scores the same
    tokens, and the two must agree. And the roots of a phase, which the trainer scores anyway, must agree in the same
    way.

    Args:
        lora: how adapters reach the sampler: "merge" folds them into the weights on the way, "adapter" hands them over
            as they are, to a sampler that computes with them (``VLLMSampler``).
        read_columns: columns read back of each weight; 0 turns this check off.
        canary_prompts: prompts of the canary, all of them asked of a new engine, later the end of one in turn (in half
            precision all of them always); 0 turns it off.
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
        self._watchdog = Watchdog(data.rollout.stall_timeout_s)
        self._pushed = None  # a checkpoint may have been restored since

    def push_if_moved(self, *, alone: bool = False) -> None:
        """Wake the sampler; push and check, if the trainer's weights moved since the last push or were lost in sleep.

        Args:
            alone: this process's sampler only; otherwise collective.

        Raises:
            WeightSyncError: the sampler does not compute with the trainer's weights.
        """
        data, module = self._data, self._data.module
        ranks = Agreement(1 if alone else module.trainer.world_size)
        # After each part all ranks learn who has failed: the trainer's forward pass may need all of them.
        with ranks.work():
            wanted = (data.engines, module.weights_version)
            kept = data.sampler.wake()
            if kept and self._pushed == wanted:
                return
            new_engine = self._pushed is None or self._pushed[0] != data.engines
            started = time.monotonic()
            read_back = self._push(module, new_engine)
            pushed = time.monotonic()
            self._metrics.add("sync/push_seconds", pushed - started)
            canary = self._read_and_ask(read_back, self._canary_prompts(module, new_engine))
        with ranks.work():
            if canary:
                self._compare(module, canary)
        self._pushed = wanted
        self._metrics.add("sync/check_seconds", time.monotonic() - pushed)

    def check_gap(self, gap: LogprobGap) -> None:
        """Compare sampler and trainer on the roots of a phase, before anything is learnt from them.

        Raises:
            WeightSyncError: they differ by more than numerics explain.
        """
        self._require_small("on the roots of this phase", gap.mean, gap.maximum)

    def _push(self, module: AppoModule, new_engine: bool) -> ReadBack:
        sampler, policy = self._data.sampler, module.policy
        read_back = ReadBack(self.read_columns, push=module.weights_version)
        if self.lora == "merge":
            _hand_over(sampler.load_weights, read_back.noting(policy.named_weights()))
            return read_back
        if new_engine:
            # It has the weights below the adapter from the checkpoint: are they the trainer's?
            for _ in read_back.noting(policy.named_weights(merge=False)):
                pass
        _hand_over(sampler.load_adapter, read_back.noting(policy.named_adapter()))
        return read_back

    def _canary_prompts(self, module: AppoModule, new_engine: bool) -> list[list[int]]:
        data = self._data
        if not (self.canary_prompts and data.sampler.provides_logprobs):
            return []
        if not self._prompts:
            source = data.validation if len(data.validation) else data.train
            room = data.rollout.max_prompt_tokens + data.rollout.max_response_tokens - self.canary_tokens
            length = min(_FIRST_CANARY, room)
            for task in data.tasks(source, range(min(self.canary_prompts, len(source)))):
                prompt = task.prompt_ids
                # The end of a prompt: beginnings are often the same system prompt.
                self._prompts.append((prompt * math.ceil(length / len(prompt)))[-length:])
        if new_engine or self._precision(module) != "float32":  # one token says little where each is rounded coarsely
            return self._prompts
        return [self._prompts[module.weights_version % len(self._prompts)][-_CANARY:]]

    def _read_and_ask(self, read_back: ReadBack, prompts: Sequence[list[int]]) -> list[Trajectory]:
        """What the sampler makes of the canary's prompts, after proof that it holds the weights and no old prefixes."""
        sampler = self._data.sampler
        cached = sampler.cached_tokens
        # The most likely token: in half precision the log-prob of an unlikely one may be far off, and these are few.
        requests = [
            SampleRequest(i, prompt, self.canary_tokens, seed=0, temperature=0.0) for i, prompt in enumerate(prompts)
        ]
        if self.read_columns:
            with read_back.comparing(sampler) as result:
                completions = self._ask(requests)
            self._metrics.add_sum("sync/checked_share", result.checked, result.checked + result.unchecked)
            _require_same(result)
        else:
            completions = self._ask(requests)
        if completions:
            cached = max(cached, completions[0].cached_tokens)  # later ones may share their beginning with the first
        if cached:
            raise WeightSyncError(
                f"after a weight push the sampler's prefix cache still serves {cached} tokens, which belong to the old "
                "weights"
            )
        return [
            Trajectory(prompt, c.token_ids, [True] * len(c.token_ids), c.logprobs, [], "length", 0)
            for prompt, c in zip(prompts, completions, strict=True)
        ]

    def _ask(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        if not requests:
            return []
        sampler = self._data.sampler
        try:
            with self._watchdog.watching():
                return self._watchdog.guard(lambda: generate(sampler, requests))
        except AppoError:
            raise
        except Exception as error:
            raise EngineFailure(
                f"{type(sampler).__name__} failed to step: {type(error).__name__}: {error}, right after a weight push"
            ) from error

    def _compare(self, module: AppoModule, canary: Sequence[Trajectory]) -> None:
        rows = pad_trajectories(canary).to(module.device)
        with module.scoring():  # as one batch, not through module.score: one rank may be here alone
            scored = module.policy.score(rows.token_ids, rows.lengths, mask=rows.mask)
        sampled = torch.tensor([logprob for trajectory in canary for logprob in trajectory.behaviour_logprobs])
        gaps = (scored.logprobs[rows.mask].cpu() - sampled).abs()
        mean = float(gaps.mean())
        self._metrics.add("sync/canary_gap", mean)
        self._require_small("after a weight push", mean, float(gaps.max()))

    def _require_small(self, when: str, mean: float, largest: float) -> None:
        limit = self.tolerance if self.tolerance is not None else _TOLERANCE[self._precision(self._data.module)]
        if not mean <= limit:  # so for NaN, too
            raise WeightSyncError(
                f"{when} the sampler's log-probs differ from the trainer's by {mean:.3g} nats on average "
                f"(limit {limit:g}): the sampler does not compute with the trainer's weights. Largest difference "
                f"{largest:.3g}. If the two only differ in precision, raise sync.tolerance"
            )

    def _precision(self, module: AppoModule) -> Precision:
        """The coarsest of what computes the two log-probs."""
        trained = (module.policy_options.dtype, str(module.trainer.precision))
        return "half" if any(name.startswith("bf") for name in trained) else self._data.sampler.precision

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._data.source is not None and self._data.source.phase is not None:
            self._data.source.measure_gap(batch)  # before this step is saved, where it was not known before it
        metrics, self._metrics = self._metrics, MetricSums()
        log_metrics(trainer, metrics)


def _hand_over(load: Callable[[Iterator[tuple[str, Tensor]]], None], weights: Iterator[tuple[str, Tensor]]) -> None:
    try:
        load(weights)
    except Exception:
        for _ in weights:  # the other ranks gather theirs, and need this one for it
            pass
        raise


def _require_same(result: ReadBackResult) -> None:
    if result.not_finite:
        raise WeightSyncError(
            f"{len(result.not_finite)} of {result.checked} weights hold NaN or infinite numbers, "
            f"{min(result.not_finite)} among them: nothing can be sampled from them; lower "
            "model.optimizer.learning_rate"
        )
    if result.different:
        raise WeightSyncError(
            f"after a weight push the sampler holds other numbers than the trainer in {len(result.different)} "
            f"of {result.checked} weights, {min(result.different)} among them: it would sample from another policy"
        )
