"""Adapters handed over to a vLLM engine.

Needs of vLLM's insides: the LoRA manager.

Runs in the process of the engine, by ``collective_rpc``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from appo_lightning.errors import ConfigurationError, SamplerError
from appo_lightning.samplers._vllm_layers import VLLMLayers
from appo_lightning.samplers._vllm_reading import ADAPTER_ID

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM has room for


def room_for_rank(rank: int) -> int:
    """The smallest adapter size of vLLM's that holds a LoRA update of some rank.

    Raises:
        ConfigurationError: there is none.
    """
    room = next((size for size in _RANKS if size >= rank), None)
    if room is None:
        raise ConfigurationError(
            f"sync.lora: adapter takes policy.lora.rank up to {_RANKS[-1]} in vLLM, got {rank}: use merge"
        )
    return room


def set_adapter(worker: Any, weights: Mapping[str, Tensor]) -> None:
    """Replace the engine's adapter.

    Args:
        worker: vLLM's.
        weights: as in ``Sampler.load_adapter``.

    Raises:
        SamplerError: vLLM cannot adapt a module.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    manager = worker.model_runner.lora_manager._adapter_manager
    layers = VLLMLayers(worker.get_model())
    matrices = {}
    for name, down in weights.items():
        module, is_down, _ = name.rpartition(".lora_A.")
        if not is_down:
            continue
        up = weights[f"{module}.lora_B.weight"]
        # vLLM passes over what it has no place for, and would sample from half an adapter.
        if layers.path(module)[0] not in manager.modules:
            raise SamplerError(
                f"vLLM cannot adapt {module}: leave it out of policy.lora.target_modules, or use sync.lora: merge"
            )
        key = layers.renamed(module)
        # A scale of alpha / rank = 1: with any other vLLM would multiply the tensor that it is given, in place.
        matrices[key] = LoRALayerWeights(key, len(down), len(down), down, up)
    rank = max(pair.rank for pair in matrices.values())
    manager.remove_adapter(ADAPTER_ID)
    manager.add_adapter(LoRAModel(ADAPTER_ID, rank, matrices))
    manager.activate_adapter(ADAPTER_ID)


def checked_adapter(weights: Iterable[tuple[str, Tensor]], rank: int) -> dict[str, Tensor]:
    """An adapter's tensors by name, complete and of the rank that the engine has room for.

    Raises:
        SamplerError: a matrix is missing, there are none, or the rank is another.
    """
    found = {name: tensor.detach() for name, tensor in weights}
    for name, tensor in found.items():
        side = "A" if ".lora_A." in name else "B"
        partner = name.replace(f".lora_{side}.", f".lora_{'B' if side == 'A' else 'A'}.")
        if partner == name or partner not in found:
            raise SamplerError(f"adapter matrix {name!r} came without its partner {partner!r}")
        if tensor.shape[0 if side == "A" else 1] != rank:
            raise SamplerError(f"adapter matrix {name!r} of shape {list(tensor.shape)} is not of rank {rank}")
    if not found:
        raise SamplerError("the adapter has no matrices: pass those of every adapted module")
    return found
