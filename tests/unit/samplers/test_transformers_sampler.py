from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from appo_lightning.errors import ConfigurationError, SamplerError
from appo_lightning.samplers._common import StopStrings, find_eos_token_ids
from appo_lightning.samplers.base import SampleRequest, generate
from appo_lightning.samplers.transformers import TransformersSampler, processed_logprobs
from helpers.sampler_contract import SamplerContract, World, assert_holds, some_requests
from helpers.tiny import EOS, build_tokenizer, perturb, save_tiny

MAX_LENGTH = 256
Weights = list[tuple[str, torch.Tensor]]
MISFITS: list[tuple[Callable[[Weights], Weights], str]] = [
    (lambda weights: weights[1:], "did not arrive"),
    (lambda weights: [*weights, weights[0]], "given twice"),
    (lambda weights: [*weights, ("extra.weight", torch.zeros(2))], "no parameter 'extra.weight'"),
    (lambda weights: [(weights[0][0], torch.zeros(3, 3)), *weights[1:]], r"must have shape .* got \[3, 3\]"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # Matrices this small lose ten times more to waiting threads than they win.
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(found)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    checkpoint = tmp_path_factory.mktemp("untied")
    policy, tokenizer = save_tiny(checkpoint, tied=False)
    sampler = TransformersSampler(device="cpu")
    sampler.start(str(checkpoint), tokenizer, max_length=MAX_LENGTH)
    yield World(sampler, policy, tokenizer, MAX_LENGTH)
    sampler.close()


@pytest.fixture(scope="module")
def tied_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    checkpoint = tmp_path_factory.mktemp("tied")
    policy, tokenizer = save_tiny(checkpoint, tied=True)
    sampler = TransformersSampler(device="cpu")
    with torch.inference_mode():  # as `validate` would start it
        sampler.start(str(checkpoint), tokenizer, max_length=MAX_LENGTH)
    return World(sampler, policy, tokenizer, MAX_LENGTH)


class TestTransformersSampler(SamplerContract):
    def test_a_step_completes_at_most_max_batch_size_requests(self, world: World, tmp_path: Path) -> None:
        _, tokenizer = save_tiny(tmp_path)
        sampler = TransformersSampler(device="cpu", max_batch_size=2)
        sampler.start(str(tmp_path), tokenizer, max_length=64)
        for request in some_requests(3, max_tokens=4):
            sampler.submit(request)
        assert [completion.id for completion in sampler.step()] == [0, 1]
        assert [completion.id for completion in sampler.step()] == [2]


@pytest.mark.parametrize(("change", "message"), MISFITS)
def test_weights_that_do_not_fit_are_refused(
    tied_world: World, change: Callable[[Weights], Weights], message: str
) -> None:
    with pytest.raises(SamplerError, match=message):
        tied_world.sampler.load_weights(change(list(tied_world.policy.named_parameters())))


def test_tied_weights_arrive_under_either_name(tied_world: World) -> None:
    for seed, remove_duplicate in enumerate([True, False]):
        perturb(tied_world.policy, seed=seed)
        tied_world.sampler.load_weights(tied_world.policy.named_parameters(remove_duplicate=remove_duplicate))
        assert_holds(tied_world, tied_world.policy, some_requests(3))


def test_starting_leaves_the_random_state_alone_and_works_once(tmp_path: Path) -> None:
    _, tokenizer = save_tiny(tmp_path)
    before = torch.get_rng_state()
    sampler = TransformersSampler(device="cpu")
    sampler.start(str(tmp_path), tokenizer, max_length=64)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(SamplerError, match="already started"):
        sampler.start(str(tmp_path), tokenizer, max_length=64)
    sampler.close()
    sampler.close()


def test_a_sampler_that_was_not_started_says_so() -> None:
    with pytest.raises(SamplerError, match="call start first"):
        TransformersSampler().submit(SampleRequest(0, [1], 1, seed=0))


def test_a_sampler_of_whole_weights_refuses_adapters_early_and_late() -> None:
    for hand_over in (lambda: TransformersSampler().expect_adapter(4), lambda: TransformersSampler().load_adapter([])):
        with pytest.raises(ConfigurationError, match="TransformersSampler does not: use merge"):
            hand_over()


def test_bfloat16_weights_are_kept_and_logprobs_stay_float32(tmp_path: Path) -> None:
    _, tokenizer = save_tiny(tmp_path)
    sampler = TransformersSampler(dtype="bfloat16", device="cpu")
    sampler.start(str(tmp_path), tokenizer, max_length=64)
    completion = generate(sampler, some_requests(1, max_tokens=8))[0]
    assert next(sampler._started().parameters()).dtype == torch.bfloat16
    assert all(math.isfinite(logprob) and logprob < 0 for logprob in completion.logprobs)


def test_eos_comes_from_tokenizer_and_generation_config(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    eos = tokenizer.convert_tokens_to_ids(EOS)
    assert find_eos_token_ids(str(tmp_path), tokenizer) == {eos}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    assert find_eos_token_ids(str(tmp_path), tokenizer) == {0, 7, eos}


class TestProcessedLogprobs:
    LOGITS = torch.tensor([[0.5, 0.05, 0.3, 0.15]]).log()

    @pytest.mark.parametrize(
        ("temperature", "top_p", "top_k", "expected"),
        [
            (1.0, 1.0, 0, [0.5, 0.05, 0.3, 0.15]),
            (0.0, 1.0, 0, [0.5, 0.05, 0.3, 0.15]),
            (1.0, 1.0, 2, [0.625, 0, 0.375, 0]),  # .5 / .8, .3 / .8
            (1.0, 0.4, 0, [1, 0, 0, 0]),  # the first token alone holds .4
            (1.0, 0.6, 0, [0.625, 0, 0.375, 0]),  # .5 < .6 <= .8
            (1.0, 0.6, 2, [1, 0, 0, 0]),  # after top-k the first token holds .625
            (0.5, 1.0, 0, [0.25, 0.0025, 0.09, 0.0225]),  # squares, to be divided by their sum .365
        ],
    )
    def test_truncation_renormalises(self, temperature: float, top_p: float, top_k: int, expected: list[float]) -> None:
        probs = processed_logprobs(
            self.LOGITS, torch.tensor([temperature]), torch.tensor([top_p]), torch.tensor([top_k])
        ).exp()
        wanted = torch.tensor([expected], dtype=torch.float32)
        torch.testing.assert_close(probs, wanted / wanted.sum())

    def test_rows_are_truncated_one_by_one(self) -> None:
        logits = self.LOGITS.repeat(2, 1)
        probs = processed_logprobs(logits, torch.ones(2), torch.tensor([1.0, 0.4]), torch.tensor([0, 0])).exp()
        torch.testing.assert_close(probs, torch.tensor([[0.5, 0.05, 0.3, 0.15], [1.0, 0, 0, 0]]))


class TestStopStrings:
    def first_stop(self, text: str, *stop: str) -> str | None:
        """What the response holds when it stops, None when it never does."""
        tokenizer = build_tokenizer()
        ids = tokenizer.encode(text, add_special_tokens=False)
        strings = StopStrings(tokenizer, stop)
        for length in range(1, len(ids) + 1):
            if strings.completed_by_last(ids[:length]) is not None:
                return str(tokenizer.decode(ids[:length]))
        return None

    def test_the_completing_token_is_kept_whole(self) -> None:
        assert self.first_stop("a</python>\nb", "</python>") == "a</python>\n"

    def test_the_string_completed_first_wins(self) -> None:
        assert self.first_stop("x</search>y</python>z", "</python>", "</search>") == "x</search>"

    def test_a_string_of_many_single_byte_tokens_is_found(self) -> None:
        assert self.first_stop("zqzqzqzq!", "qzqzqz") == "zqzqzqz"

    def test_multi_byte_characters_are_found_once_complete(self) -> None:
        assert self.first_stop("in 北海!", "海") == "in 北海"

    def test_an_ascii_end_behind_a_part_of_a_character_is_found(self) -> None:
        tokenizer = build_tokenizer()
        part = tokenizer.encode("海", add_special_tokens=False)[:1]
        strings = StopStrings(tokenizer, ("</python>",))
        ids = part + tokenizer.encode("</python>", add_special_tokens=False)
        assert [strings.completed_by_last(ids[:n]) for n in range(1, len(ids))] == [None] * (len(ids) - 1)
        assert strings.completed_by_last(ids) == "</python>"

    def test_text_is_decoded_only_where_a_string_may_end(self) -> None:
        tokenizer = build_tokenizer()
        strings = StopStrings(tokenizer, ("</python>",))
        ids = tokenizer.encode("東京" * 10 + EOS, add_special_tokens=False)
        for length in range(1, len(ids) + 1):
            strings.completed_by_last(ids[:length])
        strings._decode = None  # type: ignore[assignment, method-assign]
        for length in range(1, len(ids) + 1):
            assert strings.completed_by_last(ids[:length]) is None

    def test_spaces_and_line_breaks_count(self) -> None:
        assert self.first_stop("end of it\n\nmore", "\n\n") == "end of it\n\n"
        assert self.first_stop("a b", " ") == "a "

    def test_special_tokens_count_as_their_text(self) -> None:
        assert self.first_stop(f"ab{EOS}cd", EOS) == f"ab{EOS}"

    def test_random_tokens_stop_where_their_whole_text_first_holds_a_string(self) -> None:
        tokenizer = build_tokenizer()
        draw = random.Random(0)
        choices = ["</python>", ">", "/p", "zq", "海", "é>", " ", "</search>\n", EOS]
        likely = [t for text in ["</python>\n", "</search>", "<zq>", "東海é>", EOS] for t in tokenizer.encode(text)]
        found = 0
        for _ in range(300):
            stop = tuple(draw.sample(choices, 2))
            ids = [draw.choice(likely) if draw.random() < 0.8 else draw.randrange(len(tokenizer)) for _ in range(12)]
            strings = StopStrings(tokenizer, stop)
            told = [length for length in range(1, 13) if strings.completed_by_last(ids[:length])]
            texts = [str(tokenizer.decode(ids[:length])) for length in range(1, 13)]
            expected = [length for length, text in enumerate(texts, 1) if any(string in text for string in stop)]
            assert told[:1] == expected[:1], (ids, stop, texts[-1])
            found += bool(told)
        assert 50 < found < 300

    def test_absent_strings_never_stop(self) -> None:
        assert self.first_stop("a</python>\nb", "</answer>", "</pythons>") is None
