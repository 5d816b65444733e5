"""The Lightning side of a trainable policy: building, sharding, optimising, checkpointing, exporting.

``SFTModule`` and ``AppoModule`` differ in their loss only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning as L
import torch
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


class PolicyModule(L.LightningModule):
    """A policy under manual optimisation.

    Args:
        policy: which model.
        optimizer: how it is optimised.
    """

    def __init__(self, policy: PolicyOptions, optimizer: OptimizerOptions) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy_options = policy
        self.optimizer_options = optimizer
        # With adapters a checkpoint holds what is trained; the base comes from its own path.
        self.strict_loading = policy.lora is None
        self.policy: CausalPolicy = None  # type: ignore[assignment]  # built in configure_model, under the strategy

    def configure_model(self) -> None:
        if self.policy is not None:
            return
        # Adapters are initialised at random: equal on every rank and in every run.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.policy = CausalPolicy(self.policy_options)
        if self.device_mesh is not None:
            shard_policy(self.policy, self.device_mesh["data_parallel"])
        self.on_policy_built()

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
        last_step = int(self.trainer.estimated_stepping_batches) if options.schedule != "constant" else 0
        factor = learning_rate_factor(options.schedule, warmup_steps=options.warmup_steps, last_step=last_step)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"}]

    # --- scoring -------------------------------------------------------------------------------------------------

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Evaluation mode, no gradient and the trainer's precision: for forwards outside the training step."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad(), self._precision_context():
                yield
        finally:
            self.train(was_training)

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

    def optimiser_step(self, micro_batches: Sequence[M], loss_of: Callable[[M], Tensor]) -> StepResult:
        """Accumulate the gradient of ``sum(loss_of(m))`` over micro-batches and ranks, clip it, step.

        Args:
            micro_batches: at least one on every rank.
            loss_of: differentiable share of the global loss; already divided by global counts.

        Raises:
            NonFiniteLossError: a loss or the gradient norm is NaN or infinite; weights are untouched.
        """
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        # FSDP2 gathers weights in every forward: all ranks run the same number of them.
        rounds = self.global_max(len(micro_batches))
        for index in range(rounds):
            with self._gradient_sync(last=index == rounds - 1):
                own = index < len(micro_batches)
                loss = loss_of(micro_batches[index if own else -1])
                if not torch.isfinite(loss):
                    raise NonFiniteLossError(f"the loss is {loss.item()} at step {self.global_step}")
                # Strategies average gradients over ranks; ours is a sum.
                self.manual_backward(loss * (self.trainer.world_size if own else 0.0))
        grad_norm = self._clip_gradients()
        if not torch.isfinite(grad_norm):
            raise NonFiniteLossError(f"the gradient norm is {grad_norm.item()} at step {self.global_step}")
        learning_rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        return StepResult(grad_norm=grad_norm.item(), learning_rate=learning_rate)

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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.policy is None:
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

    def export(self, directory: str, *, merge: bool = True) -> None:
        """Write the policy as an ordinary transformers checkpoint (``merge=False``: LoRA adapters for PEFT).

        Collective under sharding: every rank calls it, rank 0 writes.
        """
        weights = (
            {name: tensor.cpu() for name, tensor in self.policy.named_weights()}
            if merge
            else self.policy.adapter_weights()
        )
        if self._trainer is None or self.trainer.is_global_zero:
            self.policy.save(directory, weights)
        if self._trainer is not None:
            self.trainer.strategy.barrier()
