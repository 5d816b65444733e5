"""Earlier weights of the policy, kept beside it: the reference of a KL term, the previous policy of a gain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from appo_lightning.policy.causal_lm import CausalPolicy, full_tensor


class PolicySnapshot:
    """A CPU copy of the trainable weights (this rank's shards of them), swapped in for a forward pass.

    With LoRA that is the adapters alone.
    """

    def __init__(self, policy: CausalPolicy) -> None:
        self._policy = policy
        self._saved: dict[str, Tensor] = {}
        self.take()

    @torch.no_grad()
    def take(self) -> None:
        """Remember the current weights."""
        self._policy.release_gathered()
        for name, parameter in self._policy.trainable():
            local = _local(parameter)
            if name in self._saved:
                self._saved[name].copy_(local)
            else:
                self._saved[name] = local.detach().to("cpu", copy=True)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside the block the policy has the remembered weights. No backward pass inside."""
        current = PolicySnapshot(self._policy)
        self._restore()
        try:
            yield
        finally:
            current._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        self._policy.release_gathered()
        for name, parameter in self._policy.trainable():
            _local(parameter).copy_(self._saved[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Whole tensors by name. Collective under sharding."""
        with self.active():
            return {name: full_tensor(p.detach()).cpu().clone() for name, p in self._policy.trainable()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` gave, cut to this rank's shards."""
        self._policy.release_gathered()
        for name, parameter in self._policy.trainable():
            whole = state[name]
            if isinstance(parameter, DTensor):
                from torch.distributed.tensor import distribute_tensor

                whole = distribute_tensor(
                    whole.to(parameter.device), parameter.device_mesh, parameter.placements
                ).to_local()
            self._saved[name].copy_(whole)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
