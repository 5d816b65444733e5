from __future__ import annotations

import copy
import gc
import importlib.util
import os
import pickle
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from appo_lightning import heap
from appo_lightning.errors import SamplerError
from appo_lightning.samplers._vllm_engine import _forget_compiled
from appo_lightning.samplers.base import SampleRequest, generate
from appo_lightning.samplers.transformers import TransformersSampler
from appo_lightning.samplers.vllm import VLLMSampler
from helpers.sampler_contract import SamplerContract, World, assert_holds, plain_logprobs, some_requests
from helpers.tiny import perturb, save_tiny

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

MAX_LENGTH = 256


def process_state() -> dict[str, Any]:
    """What a sampler must leave as it was found."""
    return {
        "torch rng": torch.get_rng_state().tolist(),
        "numpy rng": pickle.dumps(np.random.get_state()),
        "python rng": random.getstate(),
        "set_num_threads": torch.set_num_threads,
        "threads": torch.get_num_threads(),
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")},
        "collecting": gc.isenabled(),
        "frozen": gc.get_freeze_count() > 10_000,  # Python 3.12 freezes some hundred objects itself
        "process group": dist.is_initialized(),
        "default dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
    }


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Any]]:
    return {}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, states: dict[str, dict[str, Any]]) -> Iterator[World]:
    checkpoint = tmp_path_factory.mktemp("untied")
    policy, tokenizer = save_tiny(checkpoint, tied=False)
    sampler = VLLMSampler(kv_cache_mb=64)
    torch.manual_seed(17)
    states["before"] = process_state()
    sampler.start(str(checkpoint), tokenizer, max_length=MAX_LENGTH)
    states["after"] = process_state()
    yield World(sampler, policy, tokenizer, MAX_LENGTH)
    sampler.close()


@pytest.fixture(scope="module")
def tied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel, Any]:
    checkpoint = tmp_path_factory.mktemp("tied")
    return checkpoint, *save_tiny(checkpoint, tied=True)


@pytest.fixture(scope="module")
def tied_world(tied_checkpoint: tuple[Path, PreTrainedModel, Any]) -> Iterator[World]:
    # A second engine beside the first: each holds its own weights and cache.
    checkpoint, policy, tokenizer = tied_checkpoint
    sampler = VLLMSampler(kv_cache_mb=64)
    with torch.inference_mode():  # as `validate` would start it
        sampler.start(str(checkpoint), tokenizer, max_length=MAX_LENGTH)
    yield World(sampler, policy, tokenizer, MAX_LENGTH)
    sampler.close()


class TestVLLMSampler(SamplerContract):
    def test_starting_leaves_the_process_as_it_was(self, world: World, states: dict[str, dict[str, Any]]) -> None:
        assert states["after"] == states["before"]

    def test_torch_threads_can_be_set_afterwards(self, world: World) -> None:
        found = torch.get_num_threads()
        torch.set_num_threads(found + 1)
        assert torch.get_num_threads() == found + 1
        generate(world.sampler, some_requests(1, max_tokens=2))
        assert torch.get_num_threads() == found + 1
        torch.set_num_threads(found)

    def test_both_samplers_agree(self, world: World, tmp_path: Path) -> None:
        world.policy.save_pretrained(tmp_path)
        twin = TransformersSampler(device="cpu")
        twin.start(str(tmp_path), world.tokenizer, max_length=MAX_LENGTH)
        requests = some_requests(8, temperature=0.0)
        for ours, theirs in zip(generate(world.sampler, requests), generate(twin, requests), strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.finish == theirs.finish
            torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=0)

    def test_a_continued_response_reuses_the_prefix_cache_until_weights_change(self, world: World) -> None:
        prompt = [5 + k % 200 for k in range(100)]
        first = generate(world.sampler, [SampleRequest(0, prompt, 30, seed=0)])[0]
        longer = [SampleRequest(1, prompt + first.token_ids, 4, seed=0)]
        # Blocks of 32 tokens, the last token is always computed again: floor((L - 1) / 32) * 32.
        reusable = (len(longer[0].token_ids) - 1) // 32 * 32
        assert generate(world.sampler, longer)[0].cached_tokens == reusable > 64
        assert_holds(world, world.policy, longer)
        world.push(world.policy)
        assert generate(world.sampler, longer)[0].cached_tokens == 0

    def test_requests_join_a_running_batch(self, world: World) -> None:
        alone = generate(world.sampler, some_requests(2, max_tokens=12))
        first, second = some_requests(2, max_tokens=12)
        world.sampler.submit(first)
        finished = [c for _ in range(3) for c in world.sampler.step()]
        world.sampler.submit(second)
        while world.sampler.num_unfinished:
            finished += world.sampler.step()
        assert [c.token_ids for c in finished] == [c.token_ids for c in alone]


def test_tied_weights_arrive(tied_world: World) -> None:
    # The packed copy of a tied output layer goes stale unless the sampler packs it again.
    policy = copy.deepcopy(tied_world.policy)
    requests = [SampleRequest(0, [5 + k % 200 for k in range(150)], 8, seed=1), *some_requests(4)[1:]]
    for seed in range(3):
        tied_world.push(policy)
        assert_holds(tied_world, policy, requests)
        perturb(policy, seed=seed)


def test_a_merged_adapter_arrives(tied_world: World) -> None:
    adapted = get_peft_model(
        copy.deepcopy(tied_world.policy),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    perturb(adapted, seed=3, scale=0.2)
    merged = copy.deepcopy(adapted).merge_and_unload()
    tied_world.sampler.load_weights(merged.named_parameters())
    assert_holds(tied_world, adapted.eval(), some_requests(4))  # type: ignore[arg-type]
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(merged.get_parameter(name), tied_world.policy.get_parameter(name))


def test_two_engines_of_a_process_do_not_share_weights(world: World, tied_world: World) -> None:
    tied_world.push(tied_world.policy)
    assert_holds(world, world.policy, some_requests(2))
    assert_holds(tied_world, tied_world.policy, some_requests(2))


def test_bfloat16_weights_arrive(tied_checkpoint: tuple[Path, PreTrainedModel, Any]) -> None:
    checkpoint, policy, tokenizer = tied_checkpoint
    policy = copy.deepcopy(policy).bfloat16()
    sampler = VLLMSampler(dtype="bfloat16", kv_cache_mb=64)
    sampler.start(str(checkpoint), tokenizer, max_length=64)
    requests = some_requests(4)
    for seed in range(2):
        sampler.load_weights(policy.named_parameters())
        for request, completion in zip(requests, generate(sampler, requests), strict=True):
            expected = plain_logprobs(policy, request, completion)
            # Eight bits of mantissa: single log-probs differ by some hundredths, stale weights by more than 1.
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=0.2, rtol=0)
        perturb(policy, seed=seed, scale=0.1)
    sampler.close()


def test_a_failing_engine_is_reported_and_can_be_replaced(
    tied_checkpoint: tuple[Path, PreTrainedModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, policy, tokenizer = tied_checkpoint
    sampler = VLLMSampler(kv_cache_mb=64)
    with pytest.raises(SamplerError, match="vLLM did not start"):
        sampler.start(str(checkpoint), tokenizer, max_length=100_000)  # beyond the positions the policy knows
    assert not dist.is_initialized()

    sampler.start(str(checkpoint), tokenizer, max_length=64)
    with pytest.raises(SamplerError, match="did not arrive"):
        sampler.load_weights(list(policy.named_parameters())[1:])
    with pytest.raises(SamplerError, match="failed before"):
        sampler.submit(SampleRequest(0, [9, 8], 4, seed=0))
    sampler.close()

    sampler.start(str(checkpoint), tokenizer, max_length=64)
    sampler.submit(SampleRequest(0, [9, 8], 4, seed=0))
    with monkeypatch.context() as patch:
        patch.setattr(sampler._engine, "step", lambda: 1 / 0)
        with pytest.raises(SamplerError, match="vLLM failed to step: ZeroDivisionError") as caught:
            sampler.step()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    sampler.close()
    assert sampler.num_unfinished == 0

    sampler.start(str(checkpoint), tokenizer, max_length=64)
    assert_holds(World(sampler, policy, tokenizer, 64), policy, some_requests(2))
    sampler.close()


@pytest.mark.distributed
def test_the_memory_of_an_engine_is_given_back_though_the_heap_is_frozen(
    tied_checkpoint: tuple[Path, PreTrainedModel, Any],
) -> None:
    checkpoint, _, tokenizer = tied_checkpoint
    sampler = VLLMSampler(kv_cache_mb=64)
    sampler.start(str(checkpoint), tokenizer, max_length=MAX_LENGTH)
    assert sampler._engine is not None
    models: list[Any] = []
    sampler._engine.apply_model(models.append)
    model = weakref.ref(models.pop())
    heap.freeze()
    try:
        sampler.close()
        assert model() is None
        assert gc.get_freeze_count() > 10_000
    finally:
        heap.thaw()


def test_a_compiled_model_hears_of_compilations_only_as_long_as_its_engine_lives() -> None:
    from torch._dynamo.convert_frame import _bytecode_hooks, register_bytecode_hook

    class Compiled(torch.nn.Module):
        def hook(self, old: Any, new: Any) -> None: ...

    found, model, other = dict(_bytecode_hooks), torch.nn.Sequential(Compiled()), Compiled()
    for module in (model[0], other, model[0]):  # of a class and of its base class
        register_bytecode_hook(module.hook)  # type: ignore[arg-type]
    _forget_compiled(model)
    kept = {hook for key, hook in _bytecode_hooks.items() if key not in found}
    _forget_compiled(other)
    assert kept == {other.hook}
    assert dict(_bytecode_hooks) == found


def test_two_ranks_train_together_and_sample_apart(tmp_path: Path) -> None:
    save_tiny(tmp_path / "checkpoint")
    mp.spawn(_rank, (tmp_path,), nprocs=2)


def _rank(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    policy, tokenizer = save_tiny(directory / f"copy-{rank}")
    sampler = VLLMSampler(kv_cache_mb=64)
    world = World(sampler, policy, tokenizer, 64)

    # Before the trainer makes its group: no group of the engine's may be left for the trainer to find.
    sampler.start(str(directory / "checkpoint"), tokenizer, max_length=64)
    assert not dist.is_initialized()
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    _train_and_sample(rank, world)
    sampler.close()
    assert dist.get_world_size() == 2

    # And after it.
    sampler.start(str(directory / "checkpoint"), tokenizer, max_length=64)
    _train_and_sample(rank, world)
    sampler.close()
    dist.barrier()
    dist.destroy_process_group()


def _train_and_sample(rank: int, world: World) -> None:
    parallel = torch.nn.parallel.DistributedDataParallel(world.policy)
    for step in range(2):
        ids = torch.randint(5, 200, (2, 8), generator=torch.Generator().manual_seed(10 * rank + step))
        parallel(ids, labels=ids).loss.backward()
        with torch.no_grad():
            for parameter in world.policy.parameters():
                assert parameter.grad is not None
                parameter.sub_(0.5 * parameter.grad)
                parameter.grad = None
        world.push(world.policy)
        # Unequal work: a rank that waited for the other inside the engine would wait forever.
        assert_holds(world, world.policy, some_requests(2 + 4 * rank, max_tokens=8))
    checksums = [torch.zeros(1, dtype=torch.float64) for _ in range(2)]
    dist.all_gather(checksums, sum(parameter.double().sum() for parameter in world.policy.parameters()).reshape(1))  # type: ignore[union-attr]
    assert checksums[0] == checksums[1]
