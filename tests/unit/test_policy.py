"""The policy scores like plain transformers, and hands its weights out like PEFT's merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from appo_lightning.errors import ConfigurationError
from appo_lightning.policy.causal_lm import CausalPolicy
from appo_lightning.policy.options import LoraOptions, PolicyOptions
from appo_lightning.policy.snapshot import PolicySnapshot
from helpers.memory import LargestOverVocabulary
from helpers.tiny import perturb, save_tiny

# float32 forwards and gradients that differ in the order of sums only.
TOLERANCE = 1e-6
LORA = LoraOptions(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Checkpoint directories by whether the head is tied to the embedding."""
    paths = {tied: tmp_path_factory.mktemp("tied" if tied else "untied") for tied in (True, False)}
    for tied, path in paths.items():
        save_tiny(path, tied=tied)
    return {tied: str(path) for tied, path in paths.items()}


@pytest.fixture
def path(checkpoints: dict[bool, str]) -> str:
    return checkpoints[True]


def build(path: str, *, lora: bool = False, **options: Any) -> CausalPolicy:
    """A policy; adapters are perturbed, for they start as nothing."""
    torch.manual_seed(0)
    policy = CausalPolicy(PolicyOptions(path, lora=LORA if lora else None, **options)).eval()
    if lora:
        perturb(policy, seed=3)
    return policy


def ragged() -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [3, 9], lengths and a mask with holes."""
    ids = torch.randint(5, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9, 4, 7])
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, [1, 2, 5, 8]] = True
    mask[1, [2, 3]] = True
    mask[2, [4, 6]] = True
    return ids, lengths, mask


def plain(model: Any, ids: Tensor, lengths: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies one sequence at a time, without padding."""
    logprobs, entropies = torch.zeros(ids.shape), torch.zeros(ids.shape)
    for row, length in enumerate(lengths.tolist()):
        log_p = (model(ids[row : row + 1, :length]).logits[0] / temperature).log_softmax(-1)
        for t in mask[row].nonzero()[:, 0].tolist():
            logprobs[row, t] = log_p[t - 1, ids[row, t]]
            entropies[row, t] = -(log_p[t - 1].exp() * log_p[t - 1]).sum()
    return logprobs, entropies


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_those_of_plain_transformers(checkpoints, tied, temperature) -> None:
    policy = build(checkpoints[tied], logit_chunk=3)
    ids, lengths, mask = ragged()
    with torch.no_grad():
        scored = policy.score(ids, lengths, mask=mask, temperature=temperature, entropy=True)
        logprobs, entropies = plain(policy.model, ids, lengths, mask, temperature)
    torch.testing.assert_close(scored.logprobs, logprobs, atol=5 * TOLERANCE, rtol=0)
    torch.testing.assert_close(scored.entropies, entropies, atol=5 * TOLERANCE, rtol=0)


def test_without_a_mask_every_token_but_the_first_and_the_padding_is_scored(path) -> None:
    policy = build(path)
    ids, lengths, _ = ragged()
    with torch.no_grad():
        scored = policy.score(ids, lengths)
    inside = torch.arange(9)[None] < lengths[:, None]
    inside[:, 0] = False
    assert scored.entropies is None
    assert torch.equal(scored.logprobs != 0, inside)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(("lora", "tied"), [(False, True), (False, False), (True, True)])
def test_gradients_are_those_of_the_plain_computation(checkpoints, lora, tied, gradient_checkpointing) -> None:
    policy = build(checkpoints[tied], lora=lora, logit_chunk=3, gradient_checkpointing=gradient_checkpointing).train()
    ids, lengths, mask = ragged()
    weight = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))

    (policy.score(ids, lengths, mask=mask, temperature=0.7).logprobs * weight).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in policy.trainable()}
    policy.zero_grad()
    (plain(policy.model, ids, lengths, mask, 0.7)[0] * weight).sum().backward()

    assert ours
    assert all((".lora_" in name) == lora for name in ours)
    for name, parameter in policy.trainable():
        scale = max(1.0, float(parameter.grad.abs().max()))
        torch.testing.assert_close(ours[name], parameter.grad, atol=TOLERANCE * scale, rtol=0, msg=name)


@pytest.mark.parametrize("lora", [False, True])
def test_no_logits_of_more_than_a_chunk_exist_forward_or_backward(path, lora) -> None:
    policy = build(path, lora=lora, logit_chunk=2).train()
    ids, lengths, mask = ragged()
    config = policy.model.config
    with LargestOverVocabulary(config.vocab_size, config.hidden_size) as largest:
        policy.score(ids, lengths, mask=mask, temperature=0.7).logprobs.sum().backward()
    assert largest.tokens == 2
    with LargestOverVocabulary(config.vocab_size, config.hidden_size) as largest:
        policy.model(ids)
    assert largest.tokens == ids.numel()  # it would have been seen


def test_a_batch_with_nothing_to_score_still_gives_every_weight_a_gradient(checkpoints) -> None:
    policy = build(checkpoints[False])
    nothing = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, dtype=torch.long)
    scored = policy.score(*nothing, mask=torch.zeros(1, 1, dtype=torch.bool))
    scored.logprobs.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for _, parameter in policy.trainable())


@pytest.mark.parametrize("tied", [True, False])
def test_named_weights_are_transformers_parameters(checkpoints, tied) -> None:
    plain_model = AutoModelForCausalLM.from_pretrained(checkpoints[tied])
    weights = dict(build(checkpoints[tied]).named_weights())
    assert list(weights) == [name for name, _ in plain_model.named_parameters()]
    assert all(torch.equal(weights[name], parameter) for name, parameter in plain_model.named_parameters())


def test_adapters_are_folded_in_like_peft_does_and_the_module_is_untouched(path) -> None:
    policy = build(path, lora=True)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    weights = dict(policy.named_weights())

    assert {n: t.shape for n, t in policy.state_dict().items()} == {n: t.shape for n, t in before.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    merged = copy.deepcopy(policy.model).merge_and_unload()  # type: ignore[operator]
    assert list(weights) == [name for name, _ in merged.named_parameters()]
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(weights[name], parameter, atol=TOLERANCE, rtol=0, msg=name)
    moved = AutoModelForCausalLM.from_pretrained(path).get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert not torch.allclose(weights["model.layers.0.self_attn.q_proj.weight"], moved, atol=1e-4)


def test_an_adapter_on_an_untied_head_scores_and_merges(checkpoints) -> None:
    options = PolicyOptions(checkpoints[False], lora=LoraOptions(rank=4, target_modules=["lm_head"]))
    policy = CausalPolicy(options).eval()
    perturb(policy, seed=3)
    ids, lengths, mask = ragged()
    with torch.no_grad():
        expected, _ = plain(policy.model, ids, lengths, mask, 1.0)
        torch.testing.assert_close(policy.score(ids, lengths, mask=mask).logprobs, expected, atol=1e-5, rtol=0)
    merged = copy.deepcopy(policy.model).merge_and_unload()  # type: ignore[operator]
    torch.testing.assert_close(dict(policy.named_weights())["lm_head.weight"], merged.lm_head.weight)


def logits(model: PreTrainedModel | PeftModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("lora", "tied"), [(False, True), (False, False), (True, True), (True, False)])
def test_an_export_loads_in_transformers_with_equal_logits(checkpoints, tmp_path: Path, lora, tied, dtype) -> None:
    policy = build(checkpoints[tied], lora=lora, dtype=dtype)
    policy.save(tmp_path, dict(policy.named_weights()))

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.config.tie_word_embeddings is tied
    original = AutoModelForCausalLM.from_pretrained(checkpoints[tied])
    assert loaded.generation_config.to_dict() == original.generation_config.to_dict()
    exact = dtype == "float32" or not lora  # merged weights are rounded to bfloat16
    torch.testing.assert_close(logits(loaded), logits(policy.model), atol=1e-5 if exact else 0.5, rtol=0)  # type: ignore[arg-type]
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == policy.tokenizer.get_vocab()


def test_exported_adapters_load_in_peft_with_equal_logits(path, tmp_path: Path) -> None:
    policy = build(path, lora=True)
    policy.save(tmp_path, policy.adapter_weights())
    assert not list(tmp_path.glob("model*"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(policy.model), atol=1e-6, rtol=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("lora", [False, True])
def test_a_snapshot_is_swapped_in_and_out_exactly(path, lora) -> None:
    policy = build(path, lora=lora)
    ids, lengths, _ = ragged()
    first = policy.score(ids, lengths).logprobs.detach()
    snapshot = PolicySnapshot(policy)
    perturb(policy, seed=5)
    second = policy.score(ids, lengths).logprobs.detach()
    with snapshot.active():
        assert torch.equal(policy.score(ids, lengths).logprobs, first)
    assert torch.equal(policy.score(ids, lengths).logprobs, second)

    state = snapshot.state_dict()
    snapshot.take()
    with snapshot.active():
        assert torch.equal(policy.score(ids, lengths).logprobs, second)
    snapshot.load_state_dict(state)
    with snapshot.active():
        assert torch.equal(policy.score(ids, lengths).logprobs, first)


def test_a_snapshot_puts_the_weights_back_when_the_block_raises(path) -> None:
    policy = build(path)
    snapshot = PolicySnapshot(policy)
    perturb(policy, seed=5)
    before = {name: parameter.clone() for name, parameter in policy.trainable()}
    with pytest.raises(RuntimeError, match="inside"), snapshot.active():
        raise RuntimeError("inside")
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.trainable())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "/no/such/checkpoint"}, "policy.path = '/no/such/checkpoint': expected a transformers checkpoint"),
        ({"path": "EMPTY"}, "expected a transformers checkpoint"),
        ({"path": "TOKENIZER_ONLY"}, "expected a causal LM that transformers can load"),
        ({"lora": LoraOptions(target_modules=["no_such_proj"])}, "policy.lora: .*no_such_proj"),
        ({"lora": LoraOptions(target_modules=["embed_tokens"])}, "policy.lora.target_modules.*linear"),
        ({"lora": LoraOptions(target_modules=["lm_head"])}, "policy.lora.target_modules.*tied"),
    ],
)
def test_a_mistake_is_told_in_one_line(path, tmp_path: Path, options, message) -> None:
    if options.get("path") == "EMPTY":
        options = {"path": str(tmp_path)}
    elif options.get("path") == "TOKENIZER_ONLY":
        AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path)
        options = {"path": str(tmp_path)}
    with pytest.raises(ConfigurationError, match=message) as raised:
        CausalPolicy(PolicyOptions(**{"path": path, **options}))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
