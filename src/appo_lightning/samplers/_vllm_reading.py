"""Columns of weights, read back from what a vLLM engine computes with.

Needs of vLLM's insides: the layers' ``quant_method``, the packed weights of CPUs (``cpu_linear``), the LoRA manager's
buffers, and the block pool of the prefix cache.

Runs in the process of the engine, by ``collective_rpc``. Axis letters: ``K`` inputs, ``N`` outputs, ``C`` columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from appo_lightning.samplers._vllm_layers import is_unquantised, layers_of, rows_of

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

ADAPTER_ID = 1  # the only adapter of an engine


def count_cached_tokens(engine: LLMEngine) -> int:
    """See ``Sampler.cached_tokens``."""
    client: Any = engine.engine_core
    pool = client.engine_core.scheduler.kv_cache_manager.block_pool
    return len(pool.cached_block_hash_to_block) * int(engine.vllm_config.cache_config.block_size)


class WeightReader:
    """Reads columns of weights; see ``Sampler.reading``.

    Args:
        worker: vLLM's.
        columns: as in ``Sampler.read_weights``.
    """

    def __init__(self, worker: Any, columns: Mapping[str, Sequence[int]]) -> None:
        self._columns = columns
        self._layers = layers_of(worker)
        self._manager = getattr(getattr(worker.model_runner, "lora_manager", None), "_adapter_manager", None)
        self._places: dict[str, list[tuple[Any, int | None]]] = {}
        # Parts of a fused layer share one: their columns are the same.
        self._packed: dict[tuple[Any, tuple[int, ...]], _PackedColumns] = {}
        units: dict[tuple[Any, ...], Tensor] = {}  # most layers have one of a few widths
        for name, chosen in columns.items():
            module, _, leaf = name.rpartition(".")
            self._places[name] = self._layers.places(module)
            for layer, _ in self._places[name] if leaf == "weight" else ():
                key = (layer, tuple(chosen))
                if key not in self._packed and layer in self._layers.packed:
                    shape = (layer.input_size, layer.params_dtype, *chosen)
                    if shape not in units:
                        units[shape] = _unit_vectors(layer.input_size, layer.params_dtype, chosen)
                    self._packed[key] = _PackedColumns(layer, units[shape])

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Around a step of the engine: read the packed weights that it passes over anyway."""
        with ExitStack() as stack:
            for packed in self._packed.values():
                stack.enter_context(packed.listening())
            yield

    def read(self) -> dict[str, list[Tensor]]:
        """By name, columns [N, C] or a vector [N] from each place that holds the weight."""
        found = {name: self._adapter(name) or self._weight(name) for name in self._columns}
        return {name: parts for name, parts in found.items() if parts}

    def _weight(self, name: str) -> list[Tensor]:
        parts = []
        for layer, index in self._places[name]:
            whole = self._whole(layer, name.rpartition(".")[2], self._columns[name])
            if whole is not None:
                parts.append(whole[rows_of(layer, index)])
        return parts

    def _whole(self, layer: Any, leaf: str, columns: Sequence[int]) -> Tensor | None:
        packed = self._packed.get((layer, tuple(columns))) if leaf == "weight" else None
        if packed is not None:
            return packed.read()
        weight = getattr(layer, leaf, None)
        if not isinstance(weight, Tensor):
            return None
        if leaf == "weight" and getattr(layer, "quant_method", None) is not None:
            return weight[:, list(columns)] if is_unquantised(layer) else None
        return weight if weight.dim() == 1 else None  # norms, biases

    def _adapter(self, name: str) -> list[Tensor]:
        module, _, side = name.removesuffix(".weight").rpartition(".lora_")
        manager, columns = self._manager, self._columns[name]
        if not module or manager is None or ADAPTER_ID not in manager.lora_index_to_id:
            return []
        path, index = self._layers.path(module)
        layer = manager.modules.get(path)
        if layer is None:
            return []
        slot = manager.lora_index_to_id.index(ADAPTER_ID)
        if side == "B":
            return [layer.lora_b_stacked[index or 0][slot, 0][:, list(columns)]]
        rank = manager.get_adapter(ADAPTER_ID).rank  # there may be room for more
        return [layer.lora_a_stacked[index or 0][slot, 0, :rank][:, list(columns)]]


def _unit_vectors(width: int, dtype: torch.dtype, columns: Sequence[int]) -> Tensor:
    """[C, K]: their products with a weight [N, K] are its columns."""
    units = torch.zeros(len(columns), width, dtype=dtype)
    return units.scatter_(1, torch.tensor(columns, dtype=torch.long)[:, None], 1)


class _PackedColumns:
    """Columns [N, C] of a weight that is packed into a form which nothing but the product can read.

    The product with unit vectors gives columns, to the bit: all other terms of its sums are 0. It takes one pass over
    the weight, as any product with few rows does, so the rows of a step of the engine and the unit vectors share one.
    """

    def __init__(self, layer: Any, units: Tensor) -> None:
        self._layer, self._compute, self._units = layer, layer.cpu_linear, units
        self._product: Tensor | None = None  # [C, N]

    @contextmanager
    def listening(self) -> Iterator[None]:
        self._layer.cpu_linear = self._listen
        try:
            yield
        finally:
            self._layer.cpu_linear = self._compute

    def _listen(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._product is not None or bias is not None or inputs.dim() != 2:
            result: Tensor = self._compute(inputs, weight, bias)
            return result
        both = self._compute(torch.cat([inputs, self._units]), weight, None)
        self._product = both[len(inputs) :]
        return both[: len(inputs)]

    def read(self) -> Tensor:
        if self._product is None:
            self._product = self._compute(self._units, self._layer.weight, None)
        return self._product.T
