"""What replaces parts of vLLM's step on a CPU says what they say."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from appo_lightning.samplers import _vllm_cpu
from appo_lightning.samplers.base import generate
from appo_lightning.samplers.vllm import VLLMSampler
from helpers.sampler_contract import some_requests
from helpers.tiny import save_tiny

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module", autouse=True)
def cpu_engine() -> None:
    platforms = pytest.importorskip("vllm.platforms")
    if not platforms.current_platform.is_cpu():
        pytest.skip("vLLM runs on an accelerator here")
    _vllm_cpu.register_norms()


def norms(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of vLLM's own torch operations, and of the kernel that takes their place."""
    from vllm import ir

    found = []
    for priority in (["native"], ["appo_cpu"]):
        with ir.ops.rms_norm.set_priority(priority):
            found.append(ir.ops.rms_norm(x, weight, 1e-6))
    return found[0], found[1]


@pytest.mark.parametrize("width", [8, 40, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_norm_of_rows_and_of_heads_is_vllms(width: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(width).to(dtype)
    rows = torch.randn(7, width).to(dtype)
    # Heads of a query, cut out of one product: rows of memory that do not follow each other.
    heads = torch.randn(7, 9 * width).to(dtype)[:, 2 * width : 5 * width].view(7, 3, width)
    assert not heads.is_contiguous()
    for x in (rows, heads):
        theirs, ours = norms(x, weight)
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def test_the_norm_with_a_residual_is_vllms() -> None:
    from vllm import ir

    torch.manual_seed(0)
    x, residual, weight = torch.randn(7, 64), torch.randn(7, 64), torch.randn(64)
    op = ir.ops.fused_add_rms_norm
    with op.set_priority(["native"]):
        theirs = op(x.clone(), residual.clone(), weight, 1e-6)
    with op.set_priority(["appo_cpu"]):
        ours = op.maybe_inplace(x.clone(), residual.clone(), weight, 1e-6)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_what_the_kernel_cannot_do_stays_with_vllm() -> None:
    theirs, ours = norms(torch.randn(3, 12), torch.randn(12))  # not whole vectors: the kernel refuses it
    assert torch.equal(ours, theirs)
    mixed, again = norms(torch.randn(3, 16).bfloat16(), torch.randn(16))
    assert torch.equal(mixed, again)


@pytest.mark.parametrize(("k", "p"), [(None, None), (5, None), (None, 0.8)])
def test_draws_and_logprobs_are_vllms_to_the_bit(k: int | None, p: float | None) -> None:
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    _vllm_cpu.shorten_sampling()
    ours, theirs = TopKTopPSampler.forward_cpu, TopKTopPSampler.forward_cpu.__wrapped__  # type: ignore[attr-defined]
    assert ours is not theirs
    sampler = TopKTopPSampler("processed_logprobs")
    torch.manual_seed(0)
    logits = torch.randn(_vllm_cpu._SEEDS_AHEAD + 9, 4, 50)  # past the draws that are made at once
    limits = {
        "k": None if k is None else torch.full((4,), k),
        "p": None if p is None else torch.full((4,), p),
    }
    found = []
    for sample in (theirs, ours):
        generators = {row: torch.Generator().manual_seed(row) for row in range(4)}
        # Requests come and go: row 2 is idle at every third step.
        steps = [
            sample(
                sampler,
                step[rows].clone(),
                {i: generators[row] for i, row in enumerate(rows)},
                **{name: None if limit is None else limit[rows] for name, limit in limits.items()},
            )
            for number, step in enumerate(logits)
            for rows in [[0, 1, 3] if number % 3 == 0 else [0, 1, 2, 3]]
        ]
        found.append(steps)
    for (tokens, logprobs), (own_tokens, own_logprobs) in zip(*found, strict=True):
        assert torch.equal(own_tokens, tokens)
        assert torch.equal(own_logprobs, logprobs)


def test_the_draws_of_a_finished_request_are_forgotten() -> None:
    gc.collect()
    before = len(_vllm_cpu._DRAWS)
    generator = torch.Generator().manual_seed(1)
    next(_vllm_cpu._draws_of(generator))
    assert len(_vllm_cpu._DRAWS) == before + 1
    del generator
    assert len(_vllm_cpu._DRAWS) == before


def test_a_request_that_samples_into_its_block_is_given_what_vllm_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    checkpoint = tmp_path / "policy"
    _, tokenizer = save_tiny(checkpoint)
    sampler = VLLMSampler(kv_cache_mb=64)
    sampler.start(str(checkpoint), tokenizer, max_length=128)
    ours: Any = KVCacheManager.allocate_slots
    theirs = ours.__wrapped__
    asked: list[bool] = []  # whether vLLM looked
    look = KVCacheCoordinator.get_num_blocks_to_allocate

    def seen(*arguments: Any, **options: Any) -> int:
        asked[-1] = True
        return look(*arguments, **options)

    def state(manager: Any, request: Any) -> tuple[Any, ...]:
        blocks = manager.coordinator.single_type_managers[0]
        held = blocks.req_to_blocks.get(request.request_id, [])
        cached = blocks.num_cached_block.get(request.request_id)
        return [block.block_id for block in held], cached, manager.block_pool.get_num_free_blocks()

    def both(self: Any, request: Any, *arguments: Any, **options: Any) -> Any:
        before = state(self, request)
        asked.append(False)
        given = ours(self, request, *arguments, **options)
        if not asked[-1]:
            assert theirs(self, request, *arguments, **options) is given
            assert state(self, request) == before
            asked[-1] = False
        return given

    monkeypatch.setattr(KVCacheCoordinator, "get_num_blocks_to_allocate", seen)
    monkeypatch.setattr(KVCacheManager, "allocate_slots", both)
    # Nine prompts of 3 to 40 tokens, 70 sampled for each: every one fills two or three blocks of 32.
    generate(sampler, some_requests(9, max_tokens=70, stop=()))
    sampler.close()
    assert asked.count(False) > 0.9 * len(asked)
    assert asked.count(True) >= 9 * 3
