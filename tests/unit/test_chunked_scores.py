"""Chunked scores are those of the plain computation, and the logits of two chunks never exist together."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from appo_lightning.policy.chunked_scores import chunked_scores
from helpers.memory import LargestOverVocabulary

N, D, V = 23, 16, 101
CHUNKS = [1, 5, 23, 100]


def given(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A head, hidden states with gradient, targets, and a weight per token."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(D, V, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, generator=generator))
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    return head, hidden, targets, torch.randn(N, generator=generator)


def plain(head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = (head(hidden).float() / temperature).log_softmax(-1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_plain_computation(dtype, temperature, chunk) -> None:
    head, hidden, targets, weight = given(dtype)
    other_head, other_hidden = copy.deepcopy(head), hidden.detach().clone().requires_grad_()
    expected, expected_entropies = plain(other_head, other_hidden, targets, temperature)
    (expected * weight).sum().backward()

    for with_entropy in (False, True):
        head.zero_grad()
        hidden.grad = None
        logprobs, entropies = chunked_scores(
            head, hidden, targets, temperature=temperature, with_entropy=with_entropy, chunk=chunk
        )
        (logprobs * weight).sum().backward()
        assert logprobs.dtype == torch.float32
        torch.testing.assert_close(logprobs, expected, atol=2e-6, rtol=1e-6)
        assert (entropies is not None) == with_entropy
        if entropies is not None:
            assert not entropies.requires_grad
            torch.testing.assert_close(entropies, expected_entropies, atol=2e-6, rtol=1e-5)
        # bfloat16: the head's gradient is rounded once per chunk.
        close = {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}
        torch.testing.assert_close(hidden.grad, other_hidden.grad, **close)
        torch.testing.assert_close(head.weight.grad, other_head.weight.grad, **close)


def test_under_autocast_the_head_is_in_half_precision_and_the_rest_is_not() -> None:
    head, hidden, targets, _ = given()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropies = chunked_scores(head, hidden, targets, temperature=0.7, with_entropy=True, chunk=5)
        expected, expected_entropies = plain(head, hidden, targets, 0.7)
    assert entropies is not None
    torch.testing.assert_close(logprobs, expected, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(entropies, expected_entropies, atol=2e-6, rtol=1e-5)


def test_a_frozen_head_passes_the_gradient_on() -> None:
    head, hidden, targets, weight = given()
    (plain(head, hidden, targets, 0.7)[0] * weight).sum().backward()
    expected = hidden.grad
    hidden.grad = None
    head.requires_grad_(False)
    logprobs, _ = chunked_scores(head, hidden, targets, temperature=0.7, with_entropy=False, chunk=5)
    (logprobs * weight).sum().backward()
    torch.testing.assert_close(hidden.grad, expected, atol=2e-6, rtol=1e-5)


def test_the_gradient_is_that_of_finite_differences() -> None:
    head, hidden, targets, _ = given()
    head = head.double()

    class Float64(nn.Module):
        """Keeps the logits in float64, where differences can be taken."""

        def forward(self, states: Tensor) -> Tensor:
            return head(states)

    def scores(states: Tensor) -> Tensor:
        return chunked_scores(Float64(), states, targets, temperature=0.7, with_entropy=False, chunk=5)[0]

    assert torch.autograd.gradcheck(scores, hidden.detach().double().requires_grad_(), atol=1e-4, rtol=1e-3, eps=1e-4)


@pytest.mark.parametrize("far", [1e4, -1e4])
def test_logits_far_from_zero_do_not_overflow(far) -> None:
    class Shifted(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return head(states) + far

    head, hidden, targets, weight = given()
    logprobs, entropies = chunked_scores(Shifted(), hidden, targets, temperature=1.0, with_entropy=True, chunk=5)
    (logprobs * weight).sum().backward()
    assert entropies is not None
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(entropies).all()
    assert torch.isfinite(hidden.grad).all()  # type: ignore[arg-type]
    torch.testing.assert_close(logprobs, plain(head, hidden, targets, 1.0)[0], atol=0.01, rtol=0)


def test_no_tensor_over_the_vocabulary_is_longer_than_a_chunk() -> None:
    head, hidden, targets, weight = given()
    with LargestOverVocabulary(V, D) as largest:
        logprobs, _ = chunked_scores(head, hidden, targets, temperature=0.7, with_entropy=True, chunk=5)
        (logprobs * weight).sum().backward()
    assert largest.tokens == 5

    with LargestOverVocabulary(V, D) as largest:
        (plain(head, hidden, targets, 0.7)[0] * weight).sum().backward()
    assert largest.tokens == N  # it would have been seen
