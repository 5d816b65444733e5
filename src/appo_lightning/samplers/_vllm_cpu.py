"""vLLM's step on a CPU, without work that changes nothing: see ``docs/benchmarks/engine.md``.

The norms go through vLLM's registry of kernels, made for it. The draws, the ranks and the blocks of the cache replace
one function each, only in versions of vLLM that they were compared with.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch

_KERNELS = "appo_cpu"
_VECTOR = 8  # elements; the kernels refuse rows that are not whole vectors
_SEEDS, _SEEDS_AHEAD = 2**31, 64

NORM_PRIORITY = {"rms_norm": [_KERNELS], "fused_add_rms_norm": [_KERNELS]}  # for ``vllm.EngineArgs.ir_op_priority``


@functools.cache  # once per process
def register_norms() -> None:
    """Offer vLLM its own compiled RMSNorm, which it leaves aside on a CPU for five torch operations."""
    import vllm.kernels  # noqa: F401  # loads the kernels
    from vllm import ir

    def usable(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
        plain = variance_size is None and weight is not None and weight.dtype == x.dtype
        return plain and x.shape[-1] % _VECTOR == 0

    def usable_with_residual(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> bool:
        in_place = x.is_contiguous() and x_residual.is_contiguous() and x_residual.dtype == x.dtype
        return in_place and usable(x, weight, epsilon, variance_size)

    @ir.ops.rms_norm.register_impl(_KERNELS, supports_args=usable)
    def rms_norm(
        x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> torch.Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        # The kernel takes rows to follow each other, and does not look: heads cut out of one product do not.
        torch.ops._C.rms_norm(out, x.contiguous(), weight, epsilon)
        return out

    @ir.ops.fused_add_rms_norm.register_impl(_KERNELS, supports_args=usable_with_residual, inplace=True)
    def fused_add_rms_norm(
        x: torch.Tensor,
        x_residual: torch.Tensor,
        weight: torch.Tensor | None,
        epsilon: float,
        variance_size: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual


@functools.cache
def shorten_sampling() -> None:
    """Draw the requests' seeds many at a time, and leave out the ranks of sampled tokens, which nothing reads."""
    from vllm.v1.sample import sampler as rest_of_sampling
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

    # vLLM compiles its count of ranks by a C++ compiler at first use, 14 s, and compares whole rows for it.
    rest_of_sampling.batched_count_greater_than = _no_ranks
    theirs = TopKTopPSampler.forward_cpu

    @functools.wraps(theirs)
    def sample(
        self: TopKTopPSampler, logits: torch.Tensor, generators: dict[int, torch.Generator], k: Any, p: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As theirs, to the bit."""
        if self.logprobs_mode != "processed_logprobs" or self.use_fp64_gumbel:
            return theirs(self, logits, generators, k, p)
        logits = apply_top_k_top_p(logits, k, p)
        logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
        seeds = torch.randint(0, _SEEDS, (len(logits),)).tolist()
        for row, generator in generators.items():
            seeds[row] = next(_draws_of(generator))
        return torch.ops._C.fused_gumbel_argmax(logits.to(torch.float32), torch.tensor(seeds)), logprobs

    TopKTopPSampler.forward_cpu = sample  # type: ignore[method-assign]


@functools.cache
def shorten_scheduling() -> None:
    """Give a request that samples one more token into a block it already holds nothing, without asking every manager
    of the cache: 31 of 32 steps.
    """
    from vllm.v1.core.kv_cache_coordinator import UnitaryKVCacheCoordinator
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vllm.v1.request import Request

    theirs = KVCacheManager.allocate_slots

    @functools.wraps(theirs)
    def allocate_slots(
        self: KVCacheManager, request: Request, num_new_tokens: int, *args: Any, **options: Any
    ) -> KVCacheBlocks | None:
        """As theirs."""
        if num_new_tokens == 1 and not args and options == _NO_LOOKAHEAD:
            manager = self.coordinator.single_type_managers[0]
            held = manager.req_to_blocks.get(request.request_id, ())
            tokens, size = request.num_computed_tokens + 1, manager.block_size
            if (
                # A block that is full goes into the prefix cache: theirs.
                tokens % size
                and tokens <= min(len(held) * size, self.max_model_len)
                and type(manager) is FullAttentionManager
                and type(self.coordinator) is UnitaryKVCacheCoordinator
            ):
                return self.empty_kv_cache_blocks
        return theirs(self, request, num_new_tokens, *args, **options)

    KVCacheManager.allocate_slots = allocate_slots  # type: ignore[method-assign]


_NO_LOOKAHEAD = {"num_lookahead_tokens": 0}  # what the scheduler says of a request that samples


def _no_ranks(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(values), dtype=torch.int64)


_DRAWS: weakref.WeakKeyDictionary[torch.Generator, Iterator[int]] = weakref.WeakKeyDictionary()


def _draws_of(generator: torch.Generator) -> Iterator[int]:
    draws = _DRAWS.get(generator)
    if draws is None:
        # The iterator must not hold the generator: the entry ends with it.
        _DRAWS[generator] = draws = _draw(weakref.ref(generator))
    return draws


def _draw(generator: weakref.ref[torch.Generator]) -> Iterator[int]:
    while True:
        yield from torch.randint(0, _SEEDS, (_SEEDS_AHEAD,), generator=generator()).tolist()
