"""Weights inside a vLLM engine: handed over, and read back as the engine computes with them.

Needs of vLLM's insides: the layers' classes and ``quant_method``, a model's name mapper and its map of fused layers,
the packed output layer on CPUs, and the LoRA manager's buffers.

Runs in the process of the engine, by ``collective_rpc``. Axis letters: ``K`` inputs, ``N`` outputs, ``C`` columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from appo_lightning.errors import ConfigurationError, SamplerError

ADAPTER_ID = 1  # the only adapter of an engine
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


def repack_tied_head(model: Any) -> None:
    """Give a tied output layer the embedding's weight, also in its packed copy."""
    # On a CPU the output layer multiplies with a packed copy of its weight. `reload_weights` refreshes the copies of
    # layers that receive weights; a tied output layer receives none and would keep the old policy.
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not model.config.tie_word_embeddings:
        return
    heads, inputs = _heads(model), _embeddings(model)
    if len(heads) != 1 or len(inputs) != 1:
        raise SamplerError(
            f"tied embeddings with {len(heads)} output and {len(inputs)} input layers cannot be synchronised on a CPU: "
            "use TransformersSampler"
        )
    heads[0].weight = inputs[0].weight
    dispatch_cpu_unquantized_gemm(heads[0], remove_weight=False)


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
    model = worker.get_model()
    layers = {}
    for name, down in weights.items():
        module, is_down, _ = name.rpartition(".lora_A.")
        if not is_down:
            continue
        up = weights[f"{module}.lora_B.weight"]
        # vLLM passes over what it has no place for, and would sample from half an adapter.
        if _adapter_place(manager, model, module) is None:
            raise SamplerError(
                f"vLLM cannot adapt {module}: leave it out of policy.lora.target_modules, or use sync.lora: merge"
            )
        key = _renamed(model, module)
        # A scale of alpha / rank = 1: with any other vLLM would multiply the tensor that it is given, in place.
        layers[key] = LoRALayerWeights(key, len(down), len(down), down, up)
    rank = max(layer.rank for layer in layers.values())
    manager.remove_adapter(ADAPTER_ID)
    manager.add_adapter(LoRAModel(ADAPTER_ID, rank, layers))
    manager.activate_adapter(ADAPTER_ID)


def read_weights(worker: Any, columns: Mapping[str, Sequence[int]]) -> dict[str, list[Tensor]]:
    """See ``Sampler.read_weights``."""
    model = worker.get_model()
    manager = getattr(getattr(worker.model_runner, "lora_manager", None), "_adapter_manager", None)
    found = {}
    for name, chosen in columns.items():
        module, _, leaf = name.rpartition(".")
        if module.endswith((".lora_A", ".lora_B")):
            owner, _, side = module.rpartition(".lora_")
            parts = [] if manager is None else _read_adapter(manager, model, owner, side, chosen)
        else:
            parts = [
                part
                for layer, index in _places(model, module)
                if (part := _read_layer(layer, leaf, index, chosen)) is not None
            ]
        if parts:
            found[name] = parts
    return found


def _places(model: Any, module: str) -> list[tuple[Any, int | None]]:
    """Layers that hold a module's weight, with its number inside a fused one."""
    path, index = _fused(model, _renamed(model, module))
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        return []
    layer = _without_adapter(layer)
    places = [(layer, index)]
    if layer in _embeddings(model) and model.config.tie_word_embeddings:
        places += [(head, None) for head in _heads(model)]
    return places


def _read_layer(layer: Any, leaf: str, index: int | None, columns: Sequence[int]) -> Tensor | None:
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
    from vllm.platforms import current_platform

    weight = getattr(layer, leaf, None)
    if not isinstance(weight, Tensor):
        return None
    method = getattr(layer, "quant_method", None)
    if method is None or leaf != "weight":
        whole = weight if weight.dim() == 1 else None  # norms, biases
    elif not isinstance(method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod):
        return None  # other numbers than were pushed, on purpose
    elif current_platform.is_cpu() and isinstance(layer, LinearBase | ParallelLMHead):
        # Packed into a form that nothing but the product can read. The product with unit vectors gives columns, to the
        # bit: all other terms of its sums are 0.
        units = torch.zeros(len(columns), layer.input_size, dtype=layer.params_dtype, device=weight.device)
        units[range(len(columns)), list(columns)] = 1
        whole = method.apply(layer, units, None).T
    else:
        whole = weight[:, list(columns)]
    if whole is None:
        return None
    if index is not None:
        start = sum(layer.output_sizes[:index])
        return whole[start : start + layer.output_sizes[index]]
    # A vocabulary is padded inside vLLM.
    return whole[: layer.org_vocab_size] if hasattr(layer, "org_vocab_size") else whole


def _read_adapter(manager: Any, model: Any, module: str, side: str, columns: Sequence[int]) -> list[Tensor]:
    place = _adapter_place(manager, model, module)
    if place is None or ADAPTER_ID not in manager.lora_index_to_id:
        return []
    layer, index = place
    slot = manager.lora_index_to_id.index(ADAPTER_ID)
    if side == "B":
        return [layer.lora_b_stacked[index or 0][slot, 0][:, list(columns)]]
    rank = manager.get_adapter(ADAPTER_ID).rank  # there may be room for more
    return [layer.lora_a_stacked[index or 0][slot, 0, :rank][:, list(columns)]]


def _adapter_place(manager: Any, model: Any, module: str) -> tuple[Any, int | None] | None:
    path, index = _fused(model, _renamed(model, module))
    layer = manager.modules.get(path)
    return None if layer is None else (layer, index)


def _renamed(model: Any, module: str) -> str:
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return str(module if mapper is None else mapper.get_rename_mapper().map_name(module) or module)


def _fused(model: Any, module: str) -> tuple[str, int | None]:
    parent, _, own = module.rpartition(".")
    for fused, parts in (getattr(model, "packed_modules_mapping", None) or {}).items():
        if own in parts and len(parts) > 1:
            return f"{parent}.{fused}", parts.index(own)
    return module, None


def _without_adapter(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _heads(model: nn.Module) -> list[Any]:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return [module for module in model.modules() if isinstance(module, ParallelLMHead)]


def _embeddings(model: nn.Module) -> list[Any]:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    heads = _heads(model)
    return [module for module in model.modules() if isinstance(module, VocabParallelEmbedding) and module not in heads]


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
