"""What only a GPU can show: captured graphs, sleep, adapters under graphs, one GPU for trainer and sampler.

Run them with a CUDA build of vLLM, each of the three that put an engine to sleep in a process of its own:
``docs/benchmarks/gpu.md`` has the commands.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from appo_lightning.policy.causal_lm import CausalPolicy
from appo_lightning.policy.options import LoraOptions, PolicyOptions
from appo_lightning.samplers.base import SampleRequest, generate
from appo_lightning.samplers.read_back import ReadBack, ReadBackResult
from appo_lightning.samplers.transformers import TransformersSampler
from appo_lightning.samplers.vllm import VLLMSampler
from helpers.engine import Engine
from helpers.sampler_contract import some_requests
from helpers.tiny import perturb, save_tiny
from helpers.training import Run, fit, make_checkpoint

pytestmark = [
    pytest.mark.engine,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

MAX_LENGTH = 128
CACHE_MB = 2048
# Eight bits of mantissa: single log-probs differ by some hundredths, stale weights by more than 1.
HALF = 0.2
LORA = LoraOptions(rank=4, alpha=6.0)
ONE_GPU = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tied")
    save_tiny(directory, tied=True)
    return str(directory)


def started(checkpoint: str, lora: LoraOptions | None = None) -> Engine:
    """Half precision and captured graphs, as a user would have it; asleep it gives its memory back."""
    sampler = VLLMSampler("bfloat16", kv_cache_mb=CACHE_MB, max_num_seqs=16, sleep_between_phases=True)
    if lora is not None:
        sampler.expect_adapter(lora.rank)
    sampler.start(checkpoint, CausalPolicy(PolicyOptions(checkpoint)).tokenizer, max_length=MAX_LENGTH)
    return Engine(sampler, checkpoint, "cuda")


@pytest.fixture(scope="module")
def engine(checkpoint: str) -> Iterator[Engine]:
    engine = started(checkpoint)
    yield engine
    engine.sampler.close()


@pytest.fixture(scope="module")
def adapting(checkpoint: str) -> Iterator[Engine]:
    engine = started(checkpoint, LORA)
    yield engine
    engine.sampler.close()


def used_mb() -> float:
    """Of the device, whoever took it."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def everything_held(policy: CausalPolicy) -> ReadBackResult:
    return ReadBackResult(checked=len(list(policy.named_weights())))


def test_captured_graphs_compute_with_every_weight_that_is_pushed(engine: Engine) -> None:
    old, new = engine.policy(), engine.policy()
    for seed in range(3):
        perturb(new, seed=seed, scale=0.2)
        assert engine.push(new) == everything_held(new)
        assert engine.gap(new) < HALF
        assert engine.gap(old) > 1


def test_a_weight_that_was_left_behind_is_named(engine: Engine) -> None:
    old, new, name = engine.policy(), engine.policy(), "model.layers.0.self_attn.k_proj.weight"
    perturb(new, seed=2, scale=0.1)
    assert engine.push(new, instead={name: dict(old.named_weights())[name]}).different == [name]


def test_a_continued_response_reuses_the_prefix_cache_until_weights_change(engine: Engine) -> None:
    policy, prompt = engine.policy(), [5 + k % 200 for k in range(60)]
    engine.push(policy)
    first = generate(engine.sampler, [SampleRequest(0, prompt, 20, seed=0)])[0]
    longer = [SampleRequest(1, prompt + first.token_ids, 4, seed=0)]
    assert generate(engine.sampler, longer)[0].cached_tokens >= 48
    engine.push(policy)
    assert generate(engine.sampler, longer)[0].cached_tokens == 0


def test_sleep_gives_the_memory_back_and_a_push_wakes_the_engine(engine: Engine) -> None:
    policy = engine.policy()
    engine.push(policy)
    requests = some_requests(4)
    before, awake = generate(engine.sampler, requests), used_mb()
    engine.sampler.sleep()
    asleep = used_mb()
    assert awake - asleep >= CACHE_MB
    assert engine.sampler.wake() is False  # without its weights
    assert engine.push(policy) == everything_held(policy)
    assert used_mb() - asleep >= CACHE_MB
    assert generate(engine.sampler, requests) == before


def test_an_adapter_samples_as_the_trainer_scores(adapting: Engine) -> None:
    policy = adapting.policy(LORA)
    for seed in range(3):  # prompts stay the same: a cache of the old adapter would answer
        perturb(policy, seed=seed, scale=0.1)
        adapting.sampler.load_adapter(policy.named_adapter())
        assert adapting.gap(policy) < HALF
        assert adapting.gap(adapting.policy()) > 1


def test_an_adapter_and_the_weights_below_it_survive_sleep(adapting: Engine) -> None:
    policy = adapting.policy(LORA)
    perturb(policy, seed=7, scale=0.1)
    awake = used_mb()
    adapting.sampler.sleep()
    assert awake - used_mb() >= CACHE_MB
    assert adapting.sampler.wake() is True
    read_back = ReadBack(4, push=0)
    names = [name for name, _ in read_back.noting(policy.named_weights(merge=False))]
    adapting.sampler.load_adapter(read_back.noting(policy.named_adapter()))
    names += [name for name, _ in policy.named_adapter()]
    assert read_back.compare(adapting.sampler) == ReadBackResult(checked=len(names))
    assert adapting.gap(policy) < HALF


def test_the_two_samplers_agree(checkpoint: str) -> None:
    """In float32, where the engine computes attention with a kernel of its own."""
    tokenizer, requests = CausalPolicy(PolicyOptions(checkpoint)).tokenizer, some_requests(6, temperature=0.0)
    said = []
    for sampler in (VLLMSampler("float32", kv_cache_mb=64, enforce_eager=True), TransformersSampler(device="cuda")):
        sampler.start(checkpoint, tokenizer, max_length=MAX_LENGTH)
        said.append(generate(sampler, requests))
        sampler.close()
    for ours, theirs in zip(*said, strict=True):
        assert ours.token_ids == theirs.token_ids
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-2, rtol=0)


@pytest.mark.parametrize("lora", [None, "merge", "adapter"])
def test_one_gpu_holds_trainer_and_sampler(tmp_path: Path, lora: str | None) -> None:
    """Once per process with sleep: vLLM's allocator for it serves one engine."""
    sync: dict[str, Any] = {} if lora is None else {"lora": lora}
    run = Run(make_checkpoint(tmp_path), max_steps=3, lora=lora is not None, sync=sync, trainer=ONE_GPU)
    sampler = VLLMSampler("bfloat16", kv_cache_mb=256, max_num_seqs=32, sleep_between_phases=lora is None)
    result = fit(run, sampler=sampler)
    assert result.series("sync/checked_share") == [1.0] * 3
    assert max(result.series("sync/canary_gap")) < 0.1
    assert result.global_step == 3


def test_a_run_on_a_gpu_is_continued(tmp_path: Path) -> None:
    checkpoint, output = make_checkpoint(tmp_path / "policy"), tmp_path / "run"
    run = Run(checkpoint, output=str(output), max_steps=2, trainer=ONE_GPU)
    fit(run, sampler=TransformersSampler())
    run.resume, run.max_steps = str(output / "last.ckpt"), 4
    result = fit(run, sampler=TransformersSampler())
    assert sorted(result.metrics) == [3, 4]
    assert max(result.series("sync/canary_gap")) < 0.1
