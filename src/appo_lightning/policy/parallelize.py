"""How the policy is cut over ranks under FSDP2."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from appo_lightning.policy.causal_lm import CausalPolicy


def shard_policy(policy: CausalPolicy, mesh: DeviceMesh) -> None:
    """Shard each transformer block, then the rest (embeddings, last norm, head) with the root.

    Args:
        policy: whole on every rank; its parameters become DTensors in place.
        mesh: one-dimensional data-parallel mesh.
    """
    for layer in policy.decoder_layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
