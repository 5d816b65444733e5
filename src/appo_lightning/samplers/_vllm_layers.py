"""The layers of a vLLM model under the names that transformers gives their modules.

Needs of vLLM's insides: the layers' classes and ``quant_method``, a model's name mapper and its map of fused layers.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any


def layers_of(worker: Any) -> VLLMLayers:
    """The layers of a worker's model: they last as long as it does, and are looked for once."""
    if not hasattr(worker, "appo_layers"):
        worker.appo_layers = VLLMLayers(worker.get_model())
    layers: VLLMLayers = worker.appo_layers
    return layers


class VLLMLayers:
    """Finds layers.

    Args:
        model: vLLM's.
    """

    def __init__(self, model: Any) -> None:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        self.model = model
        self._places: dict[str, list[tuple[Any, int | None]]] = {}
        modules = list(model.modules())
        self.heads = [module for module in modules if isinstance(module, ParallelLMHead)]
        self.embeddings = [
            module
            for module in modules
            if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
        ]
        self.tied = bool(model.config.tie_word_embeddings)
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._mapper = None if mapper is None else mapper.get_rename_mapper()
        self._fused = {
            part: (fused, index)
            for fused, parts in (getattr(model, "packed_modules_mapping", None) or {}).items()
            if len(parts) > 1
            for index, part in enumerate(parts)
        }

    @cached_property
    def packed(self) -> frozenset[Any]:
        """Those that compute with a packed copy of their weight."""
        return frozenset(module for module in self.model.modules() if _is_packed(module))

    def renamed(self, module: str) -> str:
        """vLLM's name of a module, were it not fused with others."""
        return module if self._mapper is None else str(self._mapper.map_name(module) or module)

    def path(self, module: str) -> tuple[str, int | None]:
        """vLLM's name of the layer that does a module's work, with the module's number inside a fused one."""
        name = self.renamed(module)
        parent, _, own = name.rpartition(".")
        if own not in self._fused:
            return name, None
        fused, index = self._fused[own]
        return f"{parent}.{fused}", index

    def places(self, module: str) -> list[tuple[Any, int | None]]:
        """Layers that hold a module's weight, each with the module's number inside a fused one; [] if there is none."""
        if module not in self._places:
            self._places[module] = self._find(module)
        return self._places[module]

    def _find(self, module: str) -> list[tuple[Any, int | None]]:
        path, index = self.path(module)
        try:
            layer = self.model.get_submodule(path)
        except AttributeError:
            return []
        layer = getattr(layer, "base_layer", layer)  # below an adapter
        places = [(layer, index)]
        if self.tied and layer in self.embeddings:
            places += [(head, None) for head in self.heads]
        return places


def _is_packed(layer: Any) -> bool:
    # As on CPUs; an embedding is looked up as it is.
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    kinds = LinearBase | ParallelLMHead
    return bool(current_platform.is_cpu()) and isinstance(layer, kinds) and is_unquantised(layer)


def is_unquantised(layer: Any) -> bool:
    """Whether a layer holds the numbers that it was given; others hold other numbers, on purpose."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    return isinstance(getattr(layer, "quant_method", None), UnquantizedLinearMethod | UnquantizedEmbeddingMethod)


def rows_of(layer: Any, index: int | None) -> slice:
    """Rows of a layer's weight, or elements of its bias, that belong to a module: those of a part of a fused layer,
    or all but the padding of a vocabulary.
    """
    if index is not None:
        start = sum(layer.output_sizes[:index])
        return slice(start, start + layer.output_sizes[index])
    if hasattr(layer, "org_vocab_size"):
        return slice(0, layer.org_vocab_size)
    return slice(0, getattr(layer, "output_size", None))
