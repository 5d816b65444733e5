"""Whole weights written into a vLLM engine.

Needs of vLLM's insides: ``reload_weights``, and on a CPU the layers' ``quant_method``, which packs their weights.

Runs in the process of the engine, by ``collective_rpc``. Axis letters: ``K`` inputs, ``N`` outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from appo_lightning.errors import SamplerError
from appo_lightning.samplers._vllm_layers import VLLMLayers, is_unquantised, layers_of, rows_of


def set_weights(worker: Any, weights: Iterable[tuple[str, Tensor]], shapes: Mapping[str, torch.Size]) -> None:
    """Replace the engine's weights.

    Args:
        worker: vLLM's.
        weights: as in ``Sampler.load_weights``, each of ``shapes`` once.
        shapes: by transformers' names.
    """
    if not hasattr(worker, "appo_writer"):  # lasts as long as the engine
        worker.appo_writer = WeightWriter(layers_of(worker), shapes)
    if worker.appo_writer.complete:
        worker.appo_writer.write(weights)
    else:
        worker.reload_weights(weights_iterator=weights)
    repack_tied_head(layers_of(worker))


class WeightWriter:
    """Writes weights straight into the layers of a model on a CPU, and has them packed as vLLM does.

    vLLM's ``reload_weights`` knows every model and every quantisation. It first restores all layers as they were before
    the model was loaded and keeps account of what arrives, which takes most of a push of a small policy.

    Args:
        layers: of vLLM's model.
        shapes: of the weights that will come, by transformers' names.
    """

    def __init__(self, layers: VLLMLayers, shapes: Mapping[str, torch.Size]) -> None:
        self._model, self._shapes = layers.model, shapes
        self._heads = layers.heads
        # A tied output layer comes last among its weight's places, and is packed behind all weights.
        self._places = {name: layers.places(name.rpartition(".")[0])[:1] for name in shapes}
        self._packed = layers.packed
        self._parts: dict[Any, dict[int, Tensor]] = {}  # of a packed layer, as far as they have arrived

    @cached_property
    def complete(self) -> bool:
        """Whether every weight has a place that takes it as it is, and every place has its weight."""
        from vllm.model_executor.layers.attention import Attention
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return False
        arriving: dict[tuple[Any, str], list[int | None]] = {}
        for name, places in self._places.items():
            leaf = name.rpartition(".")[2]
            if not places or not self._fits(*places[0], leaf, self._shapes[name]):
                return False
            arriving.setdefault((places[0][0], leaf), []).append(places[0][1])
        if any(parts != [None] and len(parts) < len(layer.output_sizes) for (layer, _), parts in arriving.items()):
            return False
        written = {id(getattr(layer, leaf)) for layer, leaf in arriving}
        if not all(id(parameter) in written for parameter in self._model.parameters()):
            return False
        # Others may derive something from weights when they are loaded.
        return all(
            isinstance(module, Attention)
            for module in self._model.modules()
            if hasattr(module, "process_weights_after_loading")
        )

    def _fits(self, layer: Any, index: int | None, leaf: str, shape: torch.Size) -> bool:
        if leaf == "weight" and getattr(layer, "quant_method", None) is not None:
            if not is_unquantised(layer):
                return False
            if layer not in self._packed or layer in self._heads:
                return tuple(shape) == (layer.org_vocab_size, layer.embedding_dim)
            rows = rows_of(layer, index)
            return tuple(shape) == (rows.stop - rows.start, layer.input_size)
        held = getattr(layer, leaf, None)
        return isinstance(held, Tensor) and held.dim() == 1 and held[rows_of(layer, index)].shape == shape

    def write(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write them all; a layer is packed as soon as its last part is there."""
        for name, tensor in weights:
            layer, index = self._places[name][0]
            leaf = name.rpartition(".")[2]
            if leaf != "weight" or layer not in self._packed:
                getattr(layer, leaf).data[rows_of(layer, index)].copy_(tensor)
            elif layer in self._heads:
                layer.weight.data[rows_of(layer, index)].copy_(tensor)
                layer.quant_method.process_weights_after_loading(layer)
            else:
                parts = self._parts.setdefault(layer, {})
                parts[index or 0] = tensor.to("cpu", layer.params_dtype)
                if index is None or len(parts) == len(layer.output_sizes):
                    whole = torch.cat([parts[i] for i in range(len(parts))])  # [N, K], a copy
                    layer.weight = torch.nn.Parameter(whole, requires_grad=False)
                    layer.quant_method.process_weights_after_loading(layer)
                    del self._parts[layer]


def repack_tied_head(layers: VLLMLayers) -> None:
    """Give a tied output layer the embedding's weight, also in its packed copy."""
    # On a CPU the output layer multiplies with a packed copy of its weight. `reload_weights` refreshes the copies of
    # layers that receive weights; a tied output layer receives none and would keep the old policy.
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not layers.tied:
        return
    heads, inputs = layers.heads, layers.embeddings
    if len(heads) != 1 or len(inputs) != 1:
        raise SamplerError(
            f"tied embeddings with {len(heads)} output and {len(inputs)} input layers cannot be synchronised on a CPU: "
            "use TransformersSampler"
        )
    heads[0].weight = inputs[0].weight
    dispatch_cpu_unquantized_gemm(heads[0], remove_weight=False)
