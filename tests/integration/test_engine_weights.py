"""What the engine computes with is what was pushed; a push that goes wrong is noticed before anyone samples."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from appo_lightning.errors import ConfigurationError, SamplerError, WeightSyncError
from appo_lightning.policy.causal_lm import CausalPolicy
from appo_lightning.policy.options import LoraOptions, PolicyOptions
from appo_lightning.samplers import _vllm_writing
from appo_lightning.samplers._vllm_layers import VLLMLayers
from appo_lightning.samplers.base import Completion, Sampler, SampleRequest, generate
from appo_lightning.samplers.read_back import ReadBack, ReadBackResult
from appo_lightning.samplers.transformers import TransformersSampler
from appo_lightning.samplers.vllm import VLLMSampler
from helpers.engine import Engine
from helpers.sampler_contract import TOLERANCE, some_requests
from helpers.tiny import perturb, save_tiny
from helpers.training import Run, fit, make_checkpoint

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

MAX_LENGTH = 128
# One of each kind: plain, fused with others, embedding (tied to the output layer), vector.
ONE_OF_EACH = [
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.embed_tokens.weight",
    "model.layers.1.self_attn.q_norm.weight",
    "model.norm.weight",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tied")
    save_tiny(directory, tied=True)
    return str(directory)


@pytest.fixture(scope="module")
def engine(checkpoint: str) -> Iterator[Engine]:
    sampler = VLLMSampler(kv_cache_mb=64)
    sampler.start(checkpoint, CausalPolicy(PolicyOptions(checkpoint)).tokenizer, max_length=MAX_LENGTH)
    yield Engine(sampler, checkpoint)
    sampler.close()


def test_every_weight_is_read_back_to_the_bit(engine: Engine) -> None:
    policy = engine.policy()
    perturb(policy, seed=1)
    names = [name for name, _ in policy.named_weights()]
    assert engine.push(policy) == ReadBackResult(checked=len(names), unchecked=0, different=[])


def packed_layers(engine: Engine) -> list[Any]:
    """Layers whose weights a CPU keeps packed."""
    assert engine.sampler._engine is not None
    modules: list[Any] = []
    engine.sampler._engine.apply_model(lambda model: modules.extend(model.modules()))
    return [
        layer for layer in modules if hasattr(layer, "cpu_linear") and not layer.__class__.__name__.startswith("Vocab")
    ]


def test_columns_are_read_in_the_step_that_samples_without_a_pass_of_their_own(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once for the parts of a fused layer: of two layers four matrices each, and the output layer."""
    policy, products = engine.policy(), []  # type: ignore[var-annotated]
    engine.push(policy)
    for layer in packed_layers(engine):
        monkeypatch.setattr(layer, "cpu_linear", _recording(products, layer, layer.cpu_linear))
    read_back = ReadBack(4, push=0)
    for _ in read_back.noting(policy.named_weights()):
        pass
    with read_back.comparing(engine.sampler) as result:
        generate(engine.sampler, some_requests(2, max_tokens=1))
    assert not result.different
    assert len(products) == 2 * 4 + 1


@pytest.mark.parametrize("eager", [True, False])
def test_reading_leaves_the_engine_as_it_was(engine: Engine, monkeypatch: pytest.MonkeyPatch, eager: bool) -> None:
    """A compiled model is not listened to, and read afterwards."""
    assert engine.sampler._engine is not None
    monkeypatch.setattr(engine.sampler._engine.vllm_config.model_config, "enforce_eager", eager)
    policy = engine.policy()
    engine.push(policy)
    requests, computing = some_requests(4), [layer.cpu_linear for layer in packed_layers(engine)]
    before = generate(engine.sampler, requests)
    read_back = ReadBack(4, push=0)
    names = [name for name, _ in read_back.noting(policy.named_weights())]
    with read_back.comparing(engine.sampler) as result:
        during = generate(engine.sampler, requests)
    assert result == ReadBackResult(checked=len(names))
    with pytest.raises(ZeroDivisionError), read_back.comparing(engine.sampler):
        raise ZeroDivisionError
    after = generate(engine.sampler, requests)
    assert [layer.cpu_linear for layer in packed_layers(engine)] == computing
    for first, second, third in zip(before, during, after, strict=True):
        assert first.token_ids == second.token_ids == third.token_ids
        assert first.logprobs == pytest.approx(second.logprobs, abs=TOLERANCE)


def test_a_layer_with_a_bias_is_read_to_the_bit(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=320, num_key_value_heads=1, **sizes)).save_pretrained(tmp_path)
    sampler, policy = VLLMSampler(kv_cache_mb=64), CausalPolicy(PolicyOptions(checkpoint := str(tmp_path)))
    sampler.start(checkpoint, policy.tokenizer, max_length=MAX_LENGTH)
    perturb(policy, seed=8)
    result = Engine(sampler, checkpoint).push(policy)
    sampler.close()
    assert any(name.endswith("q_proj.bias") for name, _ in policy.named_weights())
    assert result == ReadBackResult(checked=len(list(policy.named_weights())))


def everything_held(sampler: VLLMSampler, policy: CausalPolicy) -> dict[str, list[Tensor]]:
    return sampler.read_weights({name: range(weight.shape[-1]) for name, weight in policy.named_weights()})


@pytest.mark.parametrize("kind", ["tied", "untied", "half precision", "biases"])
def test_weights_written_into_the_layers_are_those_that_vllm_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    save_tiny(tmp_path, tied=kind == "tied")
    if kind == "biases":
        # vLLM pads a vocabulary to a multiple of 64.
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
        Qwen2ForCausalLM(Qwen2Config(vocab_size=330, num_key_value_heads=1, **sizes)).save_pretrained(tmp_path)
    dtype = "bfloat16" if kind == "half precision" else "float32"
    sampler, policy = VLLMSampler(dtype, kv_cache_mb=64), CausalPolicy(PolicyOptions(str(tmp_path)))
    sampler.start(str(tmp_path), policy.tokenizer, max_length=MAX_LENGTH)
    reloads: list[Any] = []
    from vllm.v1.worker.gpu_worker import Worker

    monkeypatch.setattr(Worker, "reload_weights", _recording(reloads, "reload", Worker.reload_weights))
    found = []
    for by_vllm in (False, True):
        perturb(policy, seed=9, scale=0.1)
        sampler.load_weights(policy.named_weights())  # other weights in between
        if by_vllm:
            monkeypatch.setattr(_vllm_writing.WeightWriter, "complete", property(lambda self: False))
        policy = CausalPolicy(PolicyOptions(str(tmp_path)))
        perturb(policy, seed=1)
        sampler.load_weights(policy.named_weights())
        assert len(reloads) == int(by_vllm)
        found.append((everything_held(sampler, policy), generate(sampler, some_requests(4))))
    sampler.close()
    (written, said), (loaded, said_then) = found
    assert said == said_then
    assert sorted(written) == sorted(loaded) == sorted(name for name, _ in policy.named_weights())
    assert all(torch.equal(a, b) for name in loaded for a, b in zip(written[name], loaded[name], strict=True))


def test_layers_that_take_weights_in_another_form_are_left_to_vllm(engine: Engine) -> None:
    assert engine.sampler._engine is not None
    shapes = dict(engine.sampler._shapes)
    models: list[Any] = []
    engine.sampler._engine.apply_model(models.append)

    def complete() -> bool:
        return _vllm_writing.WeightWriter(VLLMLayers(models[0]), shapes).complete

    assert complete()
    name = "model.layers.1.self_attn.k_proj.weight"
    shape = shapes.pop(name)
    assert not complete()  # a part of a fused layer does not come
    shapes[name] = torch.Size([shape[1] + 1, shape[0]])  # transposed, say
    assert not complete()
    shapes[name] = shape
    norm = shapes.pop("model.norm.weight")
    assert not complete()
    shapes["model.norm.weight"] = norm
    shapes["model.experts.weight"] = norm
    assert not complete()
    del shapes["model.experts.weight"]
    layer = models[0].model.layers[0].mlp
    layer.process_weights_after_loading = lambda dtype: None  # it derives something
    try:
        assert not complete()
    finally:
        del layer.process_weights_after_loading
    assert complete()


def test_numbers_that_are_not_finite_are_told_apart_from_others(engine: Engine) -> None:
    policy = engine.policy()
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        dict(policy.named_parameters())[f"model.{name}"][3, 5] = torch.inf  # not in a column that is read
    result = engine.push(policy)
    assert result.different == result.not_finite == [name]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_weight_that_was_left_behind_is_named(engine: Engine, name: str) -> None:
    old, new = engine.policy(), engine.policy()
    perturb(new, seed=2, scale=1e-6)
    assert engine.push(new, instead={name: dict(old.named_weights())[name]}).different == [name]


def test_an_output_layer_that_was_not_packed_again_is_named(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = engine.policy()
    engine.push(policy)
    monkeypatch.setattr(_vllm_writing, "repack_tied_head", lambda layers: None)
    perturb(policy, seed=3, scale=1e-6)
    assert engine.push(policy).different == ["model.embed_tokens.weight"]


class Accountant(VLLMSampler):
    """Compares what the prefix cache serves with what was computed since the last push, and before it."""

    BLOCK = 32

    def __init__(self) -> None:
        super().__init__(kv_cache_mb=64)
        self.finished: list[list[int]] = []  # since the last push
        self.older: list[list[int]] = []
        self.asked: dict[int, tuple[int, int, int]] = {}
        self.served: list[tuple[int, int, int, int]] = []  # from cache; possible by finished, by all, by older ones
        self.running: dict[int, list[int]] = {}

    def load_weights(self, weights: Any) -> None:
        super().load_weights(weights)
        self.older, self.finished = self.older + self.finished, []

    def submit(self, request: SampleRequest) -> None:
        super().submit(request)
        by_finished = self._blocks(request.token_ids, self.finished)
        by_all = self._blocks(request.token_ids, self.finished + list(self.running.values()))
        self.asked[request.id] = (by_finished, by_all, self._blocks(request.token_ids, self.older))
        self.running[request.id] = request.token_ids

    def step(self) -> list[Completion]:
        completions = super().step()
        for completion in completions:
            # Of the token sampled last nothing was computed.
            self.finished.append([*self.running.pop(completion.id), *completion.token_ids[:-1]])
            self.served.append((completion.cached_tokens, *self.asked.pop(completion.id)))
        return completions

    def _blocks(self, token_ids: list[int], others: list[list[int]]) -> int:
        shared = max((_common(token_ids[:-1], other) for other in others), default=0)
        return shared // self.BLOCK * self.BLOCK


def _common(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def test_cached_prefixes_live_exactly_as_long_as_the_weights(tmp_path: Path) -> None:
    """Branches of the first mini-batch continue what the roots have computed; after a push nothing old is served."""
    sampler = Accountant()
    run = Run(make_checkpoint(tmp_path, hidden_size=32, num_layers=1), max_steps=2)
    run.sync = {"canary_prompts": 0}
    result = fit(run, sampler=sampler)
    assert all(by_finished <= cached <= by_all for cached, by_finished, by_all, _ in sampler.served)
    assert any(by_finished > 0 for _, by_finished, _, _ in sampler.served)
    # What only the old weights had computed was asked for again, and computed again.
    assert any(old > by_all for _, _, by_all, old in sampler.served)
    assert result.series("rollout/cached_token_share")[0] > 0


def one_step_later(policy: CausalPolicy) -> ReadBack:
    """What an optimiser step at a learning rate of 1e-6 makes of a policy; and no push."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.0)
    policy.score(torch.arange(5, 105)[None], torch.tensor([100])).logprobs.sum().backward()
    optimizer.step()
    read_back = ReadBack(4, push=0)
    for _ in read_back.noting(policy.named_weights()):
        pass
    return read_back


def test_weights_one_step_old_are_noticed_at_a_learning_rate_of_1e_6(engine: Engine) -> None:
    policy = engine.policy()
    engine.push(policy)
    read_back = one_step_later(policy)
    assert engine.gap(policy) < 1e-3  # the limit of the canary: it could not tell
    assert set(read_back.compare(engine.sampler).different) >= {
        name for name, weight in policy.named_weights() if weight.dim() == 2
    }


def test_weights_one_step_old_are_noticed_in_half_precision_too(checkpoint: str) -> None:
    """Such a step moves one rounded number in a hundred."""
    sampler, policy = VLLMSampler(dtype="bfloat16", kv_cache_mb=64), CausalPolicy(PolicyOptions(checkpoint))
    sampler.start(checkpoint, policy.tokenizer, max_length=MAX_LENGTH)
    read_back = ReadBack(4, push=0)
    sampler.load_weights(read_back.noting(policy.named_weights()))
    assert read_back.compare(sampler).different == []
    assert len(one_step_later(policy).compare(sampler).different) >= 5
    sampler.close()


def test_a_prefix_cache_that_outlived_a_push_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(make_checkpoint(tmp_path, hidden_size=32, num_layers=1), max_steps=2)

    class Forgetful(VLLMSampler):
        def start(self, *args: Any, **options: Any) -> None:
            super().start(*args, **options)
            monkeypatch.setattr(self._engine, "reset_prefix_cache", lambda: True)

    sampler = Forgetful(kv_cache_mb=64)
    with pytest.raises(
        WeightSyncError, match=r"prefix cache still serves [1-9]\d* tokens, which belong to the old weights"
    ):
        fit(run, sampler=sampler)
    sampler.close()


def test_the_weights_wake_before_the_push_and_the_cache_after_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU has nothing to give back, but the engine goes through the same states."""
    sampler, core = engine.sampler, engine.sampler._engine
    assert core is not None
    monkeypatch.setattr(sampler, "sleep_between_phases", True)
    calls: list[Any] = []
    for name in ("sleep", "wake_up", "collective_rpc"):
        monkeypatch.setattr(core, name, _recording(calls, name, getattr(core, name)))
    policy = engine.policy()
    perturb(policy, seed=6)
    sampler.sleep()
    sampler.sleep()  # once is enough
    assert core.engine_core.is_sleeping()
    assert sampler.wake() is False
    sampler.load_weights(policy.named_weights())
    assert sampler.wake() is True
    assert not core.engine_core.is_sleeping()
    said = [(name, *args[:1], *options.values()) for name, args, options in calls]
    assert [entry[:2] for entry in said] == [
        ("sleep", 2),  # the weights are forgotten
        ("wake_up", ["weights"]),
        ("collective_rpc", _vllm_writing.set_weights),
        ("wake_up", ["kv_cache"]),
    ]
    assert engine.gap(policy) < TOLERANCE


def _recording(calls: list[Any], name: str, function: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        calls.append((name, args, options))
        return function(*args, **options)

    return call


def test_an_engine_with_requests_does_not_fall_asleep(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.sampler, "sleep_between_phases", True)
    engine.sampler.submit(some_requests(1)[0])
    with pytest.raises(SamplerError, match="1 requests are unfinished"):
        engine.sampler.sleep()
    engine.sampler.abort([0])


def test_without_a_gpu_sleep_is_refused(checkpoint: str) -> None:
    with pytest.raises(ConfigurationError, match="sleep_between_phases needs CUDA, the engine runs on cpu: set it to"):
        VLLMSampler(sleep_between_phases=True).start(
            checkpoint, CausalPolicy(PolicyOptions(checkpoint)).tokenizer, max_length=64
        )


def test_a_second_engine_that_sleeps_is_refused_in_one_line(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would fail in an assertion."""
    from vllm.device_allocator.cumem import CuMemAllocator

    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cuda=lambda: True))
    monkeypatch.setattr(CuMemAllocator, "instance", SimpleNamespace(get_current_usage=lambda: 3 << 29))
    with pytest.raises(SamplerError, match=r"one engine per process, .* holds 1.5 GiB: start again from the last"):
        VLLMSampler(sleep_between_phases=True).start(
            checkpoint, CausalPolicy(PolicyOptions(checkpoint)).tokenizer, max_length=64
        )


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        (torch.float32, "cpu", "float32"),
        (torch.float32, "cuda", "tf32"),
        (torch.bfloat16, "cpu", "half"),
        (torch.float16, "cuda", "half"),
    ],
)
def test_the_precision_is_that_of_the_engine(dtype: torch.dtype, device: str, expected: str) -> None:
    sampler, config = (
        VLLMSampler(),
        SimpleNamespace(model_config=SimpleNamespace(dtype=dtype), device_config=SimpleNamespace(device_type=device)),
    )
    sampler._engine = SimpleNamespace(vllm_config=config)  # type: ignore[assignment]
    assert sampler.precision == expected


@pytest.mark.parametrize("sampler", [VLLMSampler(kv_cache_mb=64), TransformersSampler()])
def test_a_checkpoint_in_half_precision_is_trained_in_float32(tmp_path: Path, sampler: Sampler) -> None:
    """The sampler keeps the checkpoint's precision, and the canary expects no more of it."""
    path = make_checkpoint(tmp_path, hidden_size=32, num_layers=1)
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(path)
    result = fit(Run(path, max_steps=1), sampler=sampler)
    assert 0 < result.series("sync/logprob_gap_mean")[0] < 0.1


# --- LoRA -----------------------------------------------------------------------------------------------------------

LORA = LoraOptions(rank=4, alpha=6.0)  # a scale that is no power of 2


@pytest.fixture(scope="module")
def adapting(checkpoint: str) -> Iterator[Engine]:
    sampler = VLLMSampler(kv_cache_mb=64)
    sampler.expect_adapter(LORA.rank)
    sampler.start(checkpoint, CausalPolicy(PolicyOptions(checkpoint)).tokenizer, max_length=MAX_LENGTH)
    yield Engine(sampler, checkpoint)
    sampler.close()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_an_adapter_samples_as_the_trainer_scores(adapting: Engine, temperature: float) -> None:
    policy = adapting.policy(LORA)
    for seed in range(3):  # prompts stay the same: a cache of the old adapter would answer
        perturb(policy, seed=seed, scale=0.1)
        adapting.sampler.load_adapter(policy.named_adapter())
        assert adapting.gap(policy, temperature) < TOLERANCE


def test_pushing_an_adapter_leaves_the_trainers_tensors_alone(adapting: Engine) -> None:
    policy = adapting.policy(LORA)
    perturb(policy, seed=0, scale=0.1)
    before = {name: tensor.clone() for name, tensor in policy.adapter_weights().items()}
    adapting.sampler.load_adapter(policy.named_adapter())
    generate(adapting.sampler, some_requests(2, max_tokens=4))
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.adapter_weights().items())


def test_an_adapter_and_the_weights_below_it_are_read_back_to_the_bit(adapting: Engine) -> None:
    policy = adapting.policy(LORA)
    adapting.sampler.load_adapter(policy.named_adapter())
    perturb(policy, seed=5, scale=1e-6)
    read_back = ReadBack(4, push=0)
    below = [name for name, _ in read_back.noting(policy.named_weights(merge=False))]
    adapter = [name for name, _ in read_back.noting(policy.named_adapter())]
    old = read_back.compare(adapting.sampler)
    assert set(old.different) >= {name for name in adapter if ".lora_B." in name}
    adapting.sampler.load_adapter(policy.named_adapter())
    assert read_back.compare(adapting.sampler) == ReadBackResult(len(below) + len(adapter), 0, [])


def test_what_cannot_be_pushed_is_refused(adapting: Engine, engine: Engine) -> None:
    with pytest.raises(SamplerError, match="started for adapters: use load_adapter"):
        adapting.sampler.load_weights([])
    with pytest.raises(SamplerError, match="call expect_adapter before start"):
        engine.sampler.load_adapter([])
    with pytest.raises(ConfigurationError, match=r"policy.lora.rank up to 512 in vLLM, got 600: use merge"):
        VLLMSampler().expect_adapter(600)


def test_a_module_that_vllm_cannot_adapt_is_refused(adapting: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself would pass over it, and sample from half an adapter."""
    monkeypatch.setattr(adapting.sampler, "_failure", None)  # and is forgotten afterwards
    matrices = [("model.norm.lora_A.weight", torch.ones(4, 64)), ("model.norm.lora_B.weight", torch.ones(64, 4))]
    with pytest.raises(SamplerError, match=r"cannot adapt model.norm: leave it out of policy.lora.target_modules"):
        adapting.sampler.load_adapter(matrices)


def test_weights_below_an_adapter_survive_sleep(adapting: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, calls = adapting.sampler, []  # type: ignore[var-annotated]
    monkeypatch.setattr(sampler, "sleep_between_phases", True)
    monkeypatch.setattr(sampler._engine, "sleep", _recording(calls, "sleep", sampler._engine.sleep))  # type: ignore[union-attr]
    sampler.sleep()
    assert sampler.wake() is True
    assert calls == [("sleep", (), {"level": 1})]
    policy = adapting.policy(LORA)
    perturb(policy, seed=7, scale=0.1)
    sampler.load_adapter(policy.named_adapter())
    assert adapting.gap(policy) < TOLERANCE


def test_training_with_adapters_in_the_engine(tmp_path: Path) -> None:
    run = Run(make_checkpoint(tmp_path, hidden_size=32, num_layers=1), max_steps=3, lora=True, sync={"lora": "adapter"})
    sampler = VLLMSampler(kv_cache_mb=64)
    result = fit(run, sampler=sampler)
    assert result.series("sync/checked_share") == [1.0] * 3
    assert max(result.series("sync/canary_gap") + result.series("sync/logprob_gap_max")) < TOLERANCE
