"""The Lightning side of a trainable policy: building, sharding, optimising, checkpointing, exporting.

``SFTModule`` and ``AppoModule`` differ in their loss only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from appo_lightning.errors import ConfigurationError, NonFiniteLossError
from appo_lightning.policy.causal_lm import CausalPolicy
from appo_lightning.policy.options import OptimizerOptions, PolicyOptions
from appo_lightning.policy.parallelize import shard_policy
from appo_lightning.policy.schedule import learning_rate_factor

M = TypeVar("M")


@dataclass(slots=True)
class StepResult:
    """What one optimiser step did."""

    grad_norm: float  # global norm before clipping
    learning_rate: float


def require_budget(name: str, tokens: int) -> None:
    """Refuse a budget that holds nothing."""
    if tokens < 1:
        raise ConfigurationError(f"model.{name} must be at least 1, got {tokens}; some thousands are usual")


class PolicyModule(L.LightningModule):
    """A policy under manual optimisation.

    Args:
        policy: which model.
        optimizer: how it is optimised.
        micro_batch_tokens: tokens of one forward and backward pass, padding included.
    """

    def __init__(self, policy: PolicyOptions, optimizer: OptimizerOptions, micro_batch_tokens: int) -> None:
        super().__init__()
        require_budget("micro_batch_tokens", micro_batch_tokens)
        self.micro_batch_tokens = micro_batch_tokens
        self.automatic_optimization = False
        self.policy_options = policy
        self.optimizer_options = optimizer
        # With adapters a checkpoint holds what is trained; the base comes from its own path.
        self.strict_loading = policy.lora is None
        self.policy: CausalPolicy = None  # type: ignore[assignment]  # built in configure_model, under the strategy

    def setup(self, stage: str) -> None:
        strategy, precision = self.trainer.strategy, self.trainer.precision
        if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
            raise ConfigurationError(
                f"trainer.strategy: {type(strategy).__name__} is not supported, its weights cannot be gathered one by "
                "one; use ddp, or lightning.pytorch.strategies.ModelParallelStrategy (FSDP2)"
            )
        if isinstance(strategy, ModelParallelStrategy):
            if strategy.device_mesh["tensor_parallel"].size() != 1:
                raise ConfigurationError(
                    "trainer.strategy: weights are sharded over data-parallel ranks only; set tensor_parallel_size: 1 "
                    f"and data_parallel_size: {self.trainer.world_size}"
                )
            if self.policy_options.lora is not None and strategy._save_distributed_checkpoint:
                raise ConfigurationError(
                    "trainer.strategy: a checkpoint of adapters alone is a single file; set "
                    "save_distributed_checkpoint: false"
                )
        if precision == "16-mixed":
            raise ConfigurationError(
                "trainer.precision = 16-mixed scales the gradients, which are clipped here; use bf16-mixed"
            )

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        # Adapters are initialised at random: equal on every rank and in every run.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.policy = CausalPolicy(self.policy_options)
        # transformers loads in evaluation mode, in which gradient checkpointing does nothing.
        self.policy.train(self.training)
        self.check_policy()
        if self.device_mesh is not None:
            shard_policy(self.policy, self.device_mesh["data_parallel"])
        self.on_policy_built()

    def check_policy(self) -> None:
        """Called once with the whole policy, before it is sharded: refuse one that cannot do what is asked of it."""

    def on_policy_built(self) -> None:
        """Called once, before a checkpoint is restored: the policy has its first weights."""

    def configure_optimizers(self) -> Any:
        options = self.optimizer_options
        optimizer = torch.optim.AdamW(
            [parameter for _, parameter in self.policy.trainable()],
            lr=options.learning_rate,
            betas=options.betas,
            weight_decay=options.weight_decay,
        )
        # A trial of one batch has no course.
        schedule = "constant" if self.trainer.fast_dev_run else options.schedule  # type: ignore[attr-defined]
        last_step = self._last_step() if schedule != "constant" else 0
        factor = learning_rate_factor(schedule, warmup_steps=options.warmup_steps, last_step=last_step)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"}]

    def _last_step(self) -> int:
        """Optimiser steps of the whole run; ``sys.maxsize`` if it has no end."""
        # trainer.estimated_stepping_batches builds the training source, which then misses its state at a resume.
        trainer = self.trainer
        limits = [sys.maxsize]
        if trainer.max_steps != -1:
            limits.append(trainer.max_steps)
        if trainer.max_epochs is not None and trainer.max_epochs != -1:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            batches, limit = len(data.train_dataloader()), trainer.limit_train_batches
            # Lightning's meaning: a float is a share, an integer a number.
            batches = int(batches * limit) if isinstance(limit, float) else min(batches, limit or batches)
            limits.append(trainer.max_epochs * batches)
        return min(limits)

    # --- scoring -------------------------------------------------------------------------------------------------

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Evaluation mode, no gradient and the trainer's precision: for forwards outside the training step."""
        with self.evaluating(), torch.no_grad(), self._precision_context():
            yield

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode; around several ``scoring``, so that only one of them walks through all modules."""
        was_training = self.training
        if was_training:
            self.eval()
        try:
            yield
        finally:
            if was_training:
                self.train()

    def _precision_context(self) -> AbstractContextManager:
        if self._trainer is None:
            return nullcontext()
        return self.trainer.precision_plugin.forward_context()

    # --- one optimiser step over micro-batches ---------------------------------------------------------------------

    def global_sum(self, value: Tensor) -> Tensor:
        """Sum over ranks; the value itself on one rank."""
        reduced = self.trainer.strategy.reduce(value.detach().clone(), reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def global_max(self, value: int) -> int:
        """Largest value over ranks."""
        if self.trainer.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return int(tensor)

    def optimiser_step(
        self, micro_batches: Sequence[M], loss_of: Callable[[M], Tensor], *, idle: M | None = None
    ) -> StepResult:
        """Accumulate the gradient of ``sum(loss_of(m))`` over micro-batches and ranks, clip it, step.

        Args:
            micro_batches: at least one on every rank.
            loss_of: differentiable share of the global loss; already divided by global counts.
            idle: a micro-batch whose loss is 0, for ranks that have fewer than others; None repeats the last one
                without its gradient.

        Raises:
            NonFiniteLossError: a loss or the gradient norm is NaN or infinite, on any rank: all ranks raise, no
                weight has changed.
        """
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        # FSDP2 gathers weights in every forward: all ranks run the same number of them.
        rounds = self.global_max(len(micro_batches))
        losses = []
        for index in range(rounds):
            with self._gradient_sync(last=index == rounds - 1):
                own = index < len(micro_batches)
                part = micro_batches[index] if own else micro_batches[-1] if idle is None else idle
                loss = loss_of(part)
                losses.append(loss.detach())
                # Strategies average gradients over ranks; ours is a sum.
                self.manual_backward(loss * (self.trainer.world_size if own else 0.0))
        self._require_finite(torch.stack(losses).tolist())
        grad_norm = self._clip_gradients().item()
        if not math.isfinite(grad_norm):
            raise NonFiniteLossError(f"the gradient norm is {grad_norm} at step {self.global_step}")
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        return StepResult(grad_norm=grad_norm, learning_rate=learning_rate)

    def _require_finite(self, losses: Sequence[float]) -> None:
        # Of all micro-batches together: asking each would stop an accelerator each time. All ranks answer together:
        # one that raised alone would leave the others waiting for it.
        broken = [loss for loss in losses if not math.isfinite(loss)]
        if self.global_max(len(broken)):
            found = f"{broken[0]}" if broken else "NaN or infinite on another process"
            raise NonFiniteLossError(f"the loss is {found} at step {self.global_step}")

    def _gradient_sync(self, *, last: bool) -> AbstractContextManager:
        if hasattr(self.policy, "set_requires_gradient_sync"):
            self.policy.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        wrapper: Any = self.trainer.strategy.model
        return nullcontext() if last or not hasattr(wrapper, "no_sync") else wrapper.no_sync()

    def _clip_gradients(self) -> Tensor:
        limit = self.optimizer_options.max_grad_norm
        parameters = [parameter for _, parameter in self.policy.trainable()]
        norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.policy_options.lora is not None:
            trained = {f"policy.{name}" for name, _ in self.policy.trainable()}
            checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
            if not isinstance(self.trainer.strategy, ModelParallelStrategy) and "optimizer_states" in checkpoint:
                checkpoint["optimizer_states"] = [self._renumbered(s) for s in checkpoint["optimizer_states"]]

    def _renumbered(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimiser's state that loads under FSDP2 too: Lightning counts all parameters there, torch the trained."""
        numbers = [number for number, parameter in enumerate(self.parameters()) if parameter.requires_grad]
        return {
            "state": {numbers[i]: moments for i, moments in state["state"].items()},
            "param_groups": [
                {**group, "params": [numbers[i] for i in group["params"]]} for group in state["param_groups"]
            ],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.policy is None or "state_dict" not in checkpoint:  # a sharded one is checked as it is loaded
            return
        stored = set(checkpoint["state_dict"])
        missing = {f"policy.{name}" for name, _ in self.policy.trainable()} - stored
        unknown = stored - set(self.state_dict())
        if missing or unknown:
            raise ConfigurationError(
                f"the checkpoint does not fit this policy: {len(missing)} trained weights missing "
                f"(first: {min(missing, default='-')}), {len(unknown)} unknown (first: {min(unknown, default='-')}); "
                "use the model.policy options that it was trained with"
            )

    def check_export(self, *, merge: bool) -> None:
        """Refuse an export that this policy cannot give.

        Raises:
            ConfigurationError: adapters are asked for, and there are none.
        """
        if not merge and self.policy_options.lora is None:
            raise ConfigurationError(
                "export.merge: false writes LoRA adapters, this policy has none; set model.policy.lora or merge: true"
            )

    def export(self, directory: str, *, merge: bool = True) -> None:
        """Write the policy as an ordinary transformers checkpoint (``merge=False``: LoRA adapters for PEFT).

        Collective under sharding: every rank calls it, rank 0 writes.
        """
        self.check_export(merge=merge)
        writes = self._trainer is None or self.trainer.is_global_zero
        weights: dict[str, Tensor] = {}
        for name, tensor in self.policy.named_weights() if merge else self.policy.adapter_weights().items():
            if writes:  # the others only take part in gathering
                weights[name] = tensor.cpu()
        if writes:
            self.policy.save(directory, weights)
        if self._trainer is not None:
            self.trainer.strategy.barrier()
