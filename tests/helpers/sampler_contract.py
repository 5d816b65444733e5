"""Claims that hold for every sampler; a test class inherits them and provides the fixture ``world``."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from appo_lightning.errors import SamplerError
from appo_lightning.samplers.base import Completion, Sampler, SampleRequest, generate
from appo_lightning.samplers.transformers import processed_logprobs
from helpers.tiny import EOS, perturb, script

# Batched against single, fused against plain kernels: float32 log-probs agree to this many nats.
TOLERANCE = 1e-4


@dataclass
class World:
    """A started sampler and the policy whose weights it holds; ``policy`` is untied, so that it can be scripted."""

    sampler: Sampler
    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    max_length: int

    def push(self, policy: PreTrainedModel) -> None:
        self.sampler.load_weights(policy.named_parameters())

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


@torch.no_grad()
def plain_logprobs(
    policy: PreTrainedModel, request: SampleRequest, completion: Completion, **settings: float
) -> torch.Tensor:
    """Log-probs of the sampled tokens from one forward pass over the whole sequence."""
    ids = torch.tensor([request.token_ids + completion.token_ids])
    logits = policy(ids).logits[0, len(request.token_ids) - 1 : -1]
    T = len(completion.token_ids)
    logprobs = processed_logprobs(
        logits,
        torch.full((T,), settings.get("temperature", 1.0)),
        torch.full((T,), settings.get("top_p", 1.0)),
        torch.full((T,), int(settings.get("top_k", 0))),
        torch.full((T,), settings.get("min_p", 0.0)),
    )
    return logprobs.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]


def assert_holds(world: World, policy: PreTrainedModel, requests: list[SampleRequest], **settings: float) -> None:
    """The sampler's log-probs are those of ``policy``."""
    for request, completion in zip(requests, generate(world.sampler, requests), strict=True):
        expected = plain_logprobs(policy, request, completion, **settings)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=TOLERANCE, rtol=0)


def some_requests(n: int, *, max_tokens: int = 24, **settings: Any) -> list[SampleRequest]:
    """Prompts of different lengths, all ids away from the special tokens."""
    return [
        SampleRequest(i, [5 + (7 * i + k) % 200 for k in range(3 + 11 * i % 40)], max_tokens, seed=100 + i, **settings)
        for i in range(n)
    ]


class SamplerContract:
    @pytest.fixture(autouse=True)
    def original_weights(self, world: World) -> Iterator[None]:
        yield
        world.sampler.abort(range(10_000))
        world.push(world.policy)

    def test_logprobs_are_those_of_a_plain_forward(self, world: World) -> None:
        assert_holds(world, world.policy, some_requests(8))

    @pytest.mark.parametrize(
        "settings",
        [
            {"temperature": 0.7},
            {"temperature": 1.5, "top_p": 0.8},
            {"top_k": 5},
            {"top_p": 0.9, "top_k": 20},
            {"min_p": 0.2},
            {"temperature": 1.5, "min_p": 0.02, "top_p": 0.9, "top_k": 30},
        ],
    )
    def test_logprobs_are_those_of_the_renormalised_distribution(self, world: World, settings: dict) -> None:
        assert_holds(world, world.policy, some_requests(6, **settings), **settings)

    def test_rows_with_different_settings_share_a_batch(self, world: World) -> None:
        settings: list[dict[str, Any]] = [
            {"temperature": 0.5},
            {"top_p": 0.6},
            {"top_k": 3},
            {},
            {"min_p": 0.1},
            {"temperature": 0.0},
        ]
        requests = [SampleRequest(i, [9, 8, 7], 16, seed=i, **chosen) for i, chosen in enumerate(settings)]
        for request, completion, chosen in zip(requests, generate(world.sampler, requests), settings, strict=True):
            expected = plain_logprobs(world.policy, request, completion, **chosen)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=TOLERANCE, rtol=0)

    def test_greedy_takes_the_most_likely_token_with_its_logprob_at_temperature_1(self, world: World) -> None:
        request = SampleRequest(0, [9, 8, 7], 8, seed=0, temperature=0.0, top_p=0.5, top_k=2, min_p=0.9)
        completion = generate(world.sampler, [request])[0]
        with torch.no_grad():
            logits = world.policy(torch.tensor([request.token_ids + completion.token_ids])).logits[0, 2:-1]
        assert completion.token_ids == logits.argmax(-1).tolist()
        expected = logits.log_softmax(-1).max(-1).values
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=TOLERANCE, rtol=0)

    def test_a_seed_samples_the_same_whatever_shares_the_batch(self, world: World) -> None:
        requests = some_requests(6)
        together = generate(world.sampler, requests)
        alone = [generate(world.sampler, [request])[0] for request in requests]
        reversed_order = generate(world.sampler, requests[::-1])[::-1]
        assert [c.token_ids for c in together] == [c.token_ids for c in alone]
        assert [c.token_ids for c in together] == [c.token_ids for c in reversed_order]

    def test_different_seeds_sample_differently(self, world: World) -> None:
        requests = [SampleRequest(i, [9, 8, 7], 16, seed=i) for i in range(8)]
        assert len({tuple(c.token_ids) for c in generate(world.sampler, requests)}) == 8

    def test_a_shorter_limit_cuts_the_same_response(self, world: World) -> None:
        short, long = (SampleRequest(0, [9, 8, 7], n, seed=5) for n in (7, 40))
        assert generate(world.sampler, [long])[0].token_ids[:7] == generate(world.sampler, [short])[0].token_ids

    def test_samples_follow_the_distribution(self, world: World) -> None:
        # Pearson's statistic over 8 outcomes: 7 degrees of freedom, 24.3 is exceeded once in 1000 sets of seeds.
        n = 1000
        requests = [SampleRequest(i, [9, 8, 7], 1, seed=i, temperature=1.3, top_k=8) for i in range(n)]
        tokens = torch.tensor([c.token_ids[0] for c in generate(world.sampler, requests)])
        with torch.no_grad():
            logits = world.policy(torch.tensor([[9, 8, 7]])).logits[0, -1:]
        logprobs = processed_logprobs(logits, torch.tensor([1.3]), torch.tensor([1.0]), torch.tensor([8]))[0]
        possible = logprobs.isfinite()
        assert possible.sum() == 8
        observed = torch.bincount(tokens, minlength=len(logprobs))
        expected = n * logprobs.exp()
        assert observed[~possible].sum() == 0
        assert ((observed - expected) ** 2 / expected)[possible].sum() < 24.3

    def test_a_stop_string_may_end_inside_a_token(self, world: World) -> None:
        spoken = world.ids("a</python>\nworld")
        assert world.tokenizer.decode(spoken[5:6]) == ">\n"
        policy = copy.deepcopy(world.policy)
        script(policy, spoken)
        world.push(policy)
        stop = ("</search>", "</python>")
        cut, whole = generate(
            world.sampler,
            [
                SampleRequest(0, spoken[:1], 8, seed=0, temperature=0.0, stop=stop),
                SampleRequest(1, spoken[:1], 8, seed=0, temperature=0.0),
            ],
        )
        assert cut.finish == "stop"
        assert cut.token_ids == spoken[1:6]
        assert len(cut.logprobs) == 5
        assert whole.finish == "length"
        assert whole.token_ids == spoken[1:9]

    def test_a_stop_string_in_the_prompt_does_not_stop(self, world: World) -> None:
        spoken = world.ids("a</python>\nworld")
        policy = copy.deepcopy(world.policy)
        script(policy, spoken)
        world.push(policy)
        request = SampleRequest(0, spoken[:5], 4, seed=0, temperature=0.0, stop=("</python>",))
        completion = generate(world.sampler, [request])[0]
        assert completion.finish == "length"
        assert completion.token_ids == spoken[5:9]

    def test_a_special_token_can_be_a_stop_string(self, world: World) -> None:
        spoken = world.ids("ab<|im_start|>cd")
        policy = copy.deepcopy(world.policy)
        script(policy, spoken)
        world.push(policy)
        request = SampleRequest(0, spoken[:1], 4, seed=0, temperature=0.0, stop=("<|im_start|>",))
        completion = generate(world.sampler, [request])[0]
        assert completion.finish == "stop"
        assert completion.token_ids == spoken[1:3]

    @pytest.mark.parametrize("max_tokens", [2, 9])
    def test_eos_and_its_logprob_are_kept(self, world: World, max_tokens: int) -> None:
        # With max_tokens = 2 EOS is also the last token allowed: it ended by itself all the same.
        spoken = world.ids(f"ab{EOS}cd")
        policy = copy.deepcopy(world.policy)
        script(policy, spoken)
        world.push(policy)
        request = SampleRequest(0, spoken[:1], max_tokens, seed=0)
        completion = generate(world.sampler, [request])[0]
        assert completion.finish == "eos"
        assert completion.token_ids == spoken[1:3]
        expected = plain_logprobs(policy, request, completion)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=TOLERANCE, rtol=0)

    def test_a_stop_string_completed_by_the_last_token_allowed_counts_as_stop(self, world: World) -> None:
        spoken = world.ids("a</python>\nworld")
        policy = copy.deepcopy(world.policy)
        script(policy, spoken)
        world.push(policy)
        request = SampleRequest(0, spoken[:1], 5, seed=0, temperature=0.0, stop=("</python>",))
        assert generate(world.sampler, [request])[0].finish == "stop"

    def test_new_weights_answer_also_after_a_cached_prompt(self, world: World) -> None:
        long_prompt = [5 + k % 200 for k in range(150)]
        requests = [SampleRequest(0, long_prompt, 8, seed=1)]
        policy = copy.deepcopy(world.policy)
        for seed in range(2):
            assert_holds(world, policy, requests)
            perturb(policy, seed=seed)
            world.push(policy)
        assert_holds(world, policy, requests)

    def test_a_validation_in_inference_mode_leaves_the_sampler_usable(self, world: World) -> None:
        policy = copy.deepcopy(world.policy)
        with torch.inference_mode():
            world.push(policy)
            generate(world.sampler, some_requests(2, max_tokens=4))
        perturb(policy, seed=0)
        world.push(policy)
        assert_holds(world, policy, some_requests(2))

    def test_weights_are_refused_while_requests_are_unfinished(self, world: World) -> None:
        world.sampler.submit(SampleRequest(0, [9, 8, 7], 4, seed=0))
        with pytest.raises(SamplerError, match="1 requests are unfinished"):
            world.push(world.policy)
        world.sampler.abort([0])
        world.push(world.policy)

    def test_sampling_leaves_global_random_states_alone(self, world: World) -> None:
        before = random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state()
        generate(world.sampler, some_requests(3, max_tokens=4))
        assert random.getstate() == before[0]
        assert pickle.dumps(np.random.get_state()) == before[1]
        assert torch.equal(torch.get_rng_state(), before[2])

    def test_aborted_requests_never_come_back(self, world: World) -> None:
        for request in some_requests(3, max_tokens=8):
            world.sampler.submit(request)
        world.sampler.abort([1, 77])
        assert world.sampler.num_unfinished == 2
        finished: list[int] = []
        while world.sampler.num_unfinished:
            finished += [completion.id for completion in world.sampler.step()]
        assert sorted(finished) == [0, 2]
        assert world.sampler.step() == []
        assert generate(world.sampler, some_requests(2, max_tokens=2))[1].id == 1  # an aborted id is free again

    def test_the_longest_request_fits_and_a_longer_one_is_refused(self, world: World) -> None:
        prompt = [5 + k % 200 for k in range(world.max_length - 4)]
        assert len(generate(world.sampler, [SampleRequest(0, prompt, 4, seed=0)])[0].token_ids) == 4
        with pytest.raises(SamplerError, match=rf"{world.max_length - 4} \+ 5 .* at most 4 tokens or raise max_length"):
            world.sampler.submit(SampleRequest(0, prompt, 5, seed=0))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"token_ids": []}, "no token_ids"),
            ({"token_ids": [100_000]}, "the policy knows"),
            ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
            ({"seed": -1}, "seed must be in"),
            ({"temperature": 0.001}, "temperature must be 0 .* got 0.001"),
            ({"temperature": 2.5}, r"temperature must be 0 \(greedy\) or in \[0.01, 2\], got 2.5"),
            ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
            ({"top_k": -1}, "top_k must be 0 .* got -1"),
            ({"min_p": 1.5}, r"min_p must be in \[0, 1\], got 1.5"),
            ({"stop": ("",)}, "stop string is empty"),
        ],
    )
    def test_requests_out_of_range_are_refused(self, world: World, change: dict, message: str) -> None:
        with pytest.raises(SamplerError, match=message):
            world.sampler.submit(SampleRequest(**{"id": 0, "token_ids": [9, 8], "max_tokens": 4, "seed": 0, **change}))
        assert world.sampler.num_unfinished == 0

    def test_an_id_in_use_is_refused(self, world: World) -> None:
        world.sampler.submit(SampleRequest(0, [9, 8, 7], 4, seed=0))
        with pytest.raises(SamplerError, match="request id 0 is already in use"):
            world.sampler.submit(SampleRequest(0, [9, 8, 7], 4, seed=0))

    def test_statistics_count_what_was_returned(self, world: World) -> None:
        before = world.sampler.stats()
        completions = generate(world.sampler, some_requests(4, max_tokens=6))
        after = world.sampler.stats()
        assert after.generated_tokens - before.generated_tokens == sum(len(c.token_ids) for c in completions)
        assert after.prompt_tokens - before.prompt_tokens == sum(len(r.token_ids) for r in some_requests(4))
        assert after.cached_tokens - before.cached_tokens == sum(c.cached_tokens for c in completions)
        assert after.steps > before.steps
        assert after.seconds > before.seconds
