import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from appo_lightning.algorithm import (
    clipped_policy_loss,
    kl_penalty,
    masked_importance_weight,
    truncated_importance_weight,
)


def ones(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def loss_of(ratios, advantages, mask=None, **options):
    """Loss and its gradient w.r.t. the log-probs, for ratios to a behaviour log-prob of 0."""
    logprob = torch.tensor([ratios], dtype=torch.float64).log().requires_grad_()
    mask = ones(1, len(ratios)) if mask is None else torch.tensor([mask])
    defaults = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "drop_lower_clipped": False}
    out = clipped_policy_loss(
        logprob,
        torch.zeros_like(logprob),
        torch.tensor([advantages], dtype=torch.float64),
        mask,
        **(defaults | options),
    )
    out.loss.backward()
    return out, logprob.grad[0].tolist()


def test_on_policy_the_gradient_is_the_policy_gradient():
    out, gradient = loss_of([1.0, 1.0], [2.0, -1.0])
    # loss = -(2 - 1) / 2, d/dlogprob = -A / 2
    assert out.loss.item() == pytest.approx(-0.5)
    assert gradient == pytest.approx([-1.0, 0.5])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 1.0, -1.1, -1.1),  # inside: -rA
        (1.5, 1.0, -1.28, 0.0),  # rewarded beyond the upper bound: nothing more to gain
        (0.5, 1.0, -0.5, -0.5),  # rewarded below the lower bound: may come back
        (0.5, -1.0, 0.8, 0.0),  # punished below the lower bound: enough
        (1.5, -1.0, 1.5, 1.5),  # punished above the upper bound: must come back
        (4.0, -1.0, 3.0, 0.0),  # dual clip: min(4, 3 * 1)
    ],
)
def test_the_clip_bounds_what_can_be_gained_not_what_can_be_lost(ratio, advantage, loss, slope):
    out, gradient = loss_of([ratio], [advantage])
    assert out.loss.item() == pytest.approx(loss)
    assert gradient == pytest.approx([slope])


def test_fractions_and_kl_count_sampled_tokens():
    ratios, advantages = [1.5, 4.0, 1.0, 9.0], [1.0, -1.0, 1.0, 1.0]
    out, _ = loss_of(ratios, advantages, mask=[True, True, True, False])
    assert out.clip_fraction.item() == pytest.approx(1 / 3)
    assert out.lower_clip_fraction.item() == pytest.approx(1 / 3)
    assert out.approx_kl.item() == pytest.approx(-(math.log(1.5) + math.log(4.0)) / 3)
    assert out.dropped_fraction.item() == 0.0
    assert not any(getattr(out, name).requires_grad for name in ("clip_fraction", "lower_clip_fraction", "approx_kl"))


def test_a_response_with_two_tokens_at_the_dual_clip_leaves_the_loss_and_its_denominator():
    logprob = torch.tensor([[4.0, 4.0, 1.0], [4.0, 1.0, 1.0]], dtype=torch.float64).log()
    advantage = -torch.ones_like(logprob)
    options = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
    out = clipped_policy_loss(logprob, torch.zeros_like(logprob), advantage, ones(2, 3), **options)
    # Row 0 has two such tokens and goes; row 1 has one and stays: (3 + 1 + 1) / 3.
    assert out.loss.item() == pytest.approx(5 / 3)
    assert out.dropped_fraction.item() == pytest.approx(0.5)
    assert out.lower_clip_fraction.item() == pytest.approx(3 / 6)
    # A caller's count stays what it is: 5 / 6.
    out = clipped_policy_loss(
        logprob, torch.zeros_like(logprob), advantage, ones(2, 3), normaliser=torch.tensor(6), **options
    )
    assert out.loss.item() == pytest.approx(5 / 6)
    # Both stay: (3 + 3 + 1 + 3 + 1 + 1) / 6
    kept = clipped_policy_loss(
        logprob, torch.zeros_like(logprob), advantage, ones(2, 3), drop_lower_clipped=False, **options
    )
    assert kept.loss.item() == pytest.approx(2.0)


def test_a_dropped_response_has_no_gradient_and_an_empty_loss_is_zero():
    out, gradient = loss_of([4.0, 4.0], [-1.0, -1.0], drop_lower_clipped=True)
    assert out.loss.item() == 0.0
    assert gradient == [0.0, 0.0]
    out, gradient = loss_of([1.0, 1.0], [1.0, 1.0], mask=[False, False])
    assert out.loss.item() == 0.0
    assert gradient == [0.0, 0.0]


def test_tool_tokens_have_no_gradient_whatever_stands_there():
    logprob = torch.tensor([[-1.0, math.nan, -math.inf]], requires_grad=True)
    old = torch.tensor([[-1.0, math.nan, -math.inf]])
    mask = torch.tensor([[True, False, False]])
    out = clipped_policy_loss(
        logprob, old, torch.tensor([[1.0, math.nan, 1.0]]), mask, clip_low=0.2, clip_high=0.28, dual_clip=3.0
    )
    out.loss.backward()
    assert out.loss.item() == -1.0
    assert logprob.grad.tolist() == [[-1.0, 0.0, 0.0]]


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 3))
def test_micro_batches_add_up_to_the_mini_batch(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 6)
    logprob, old = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    advantage = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.7
    options = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "normaliser": mask.sum()}
    whole = clipped_policy_loss(logprob, old, advantage, mask, **options).loss
    parts = [
        clipped_policy_loss(*(tensor[i : i + rows] for tensor in (logprob, old, advantage, mask)), **options).loss
        for i in range(0, 4, rows)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_importance_weights_multiply_tokens_and_carry_no_gradient():
    weight = torch.tensor([[0.5, 2.0]], requires_grad=True)
    out, gradient = loss_of([1.0, 1.0], [1.0, 1.0], weight=weight)
    assert out.loss.item() == pytest.approx(-1.25)
    assert gradient == pytest.approx([-0.25, -1.0])
    assert weight.grad is None


def test_extreme_ratios_stay_finite():
    out, gradient = loss_of([math.exp(700.0), math.exp(-700.0)], [-1.0, 1.0], dual_clip=None)
    assert math.isfinite(out.loss.item())
    assert gradient == [0.0, 0.0]


def test_half_precision_is_raised():
    logprob = torch.zeros(1, 300, dtype=torch.bfloat16)
    out = clipped_policy_loss(
        logprob, logprob, torch.ones(1, 300), ones(1, 300), clip_low=0.2, clip_high=0.28, dual_clip=3.0
    )
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == -1.0


def test_kl_estimators():
    logprob, reference = torch.tensor([[-1.0]], requires_grad=True), torch.tensor([[-1.5]])
    # d = 0.5
    assert kl_penalty(logprob, reference, "k1").item() == 0.5
    assert kl_penalty(logprob, reference, "k2").item() == 0.125
    assert kl_penalty(logprob, reference, "k3").item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    kl_penalty(logprob, reference, "k3").sum().backward()
    # d k3 / d logprob = 1 - exp(-d)
    assert logprob.grad.item() == pytest.approx(1 - math.exp(-0.5))


def test_k3_is_bounded_and_not_negative():
    far = kl_penalty(torch.tensor([[-900.0, 0.0]]), torch.tensor([[0.0, -900.0]]), "k3")
    assert far.tolist() == [[10.0, 10.0]]
    near = torch.linspace(-1e-3, 1e-3, 101).unsqueeze(0)
    assert (kl_penalty(near, torch.zeros_like(near), "k3") >= 0).all()


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_values_are_unbiased(kind):
    log_policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
    log_reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    exact = (log_policy.exp() * (log_policy - log_reference)).sum()
    torch.testing.assert_close((log_policy.exp() * kl_penalty(log_policy, log_reference, kind)).sum(), exact)


def test_importance_weights_are_capped_constants():
    trainer = torch.tensor([[0.0, -1.0, 3.0]], requires_grad=True)
    weight = truncated_importance_weight(trainer, torch.zeros(1, 3), cap=2.0)
    torch.testing.assert_close(weight, torch.tensor([[1.0, math.exp(-1.0), 2.0]]))
    assert not weight.requires_grad


def test_tokens_on_which_sampler_and_trainer_disagree_too_much_are_left_out():
    trainer = torch.tensor([[0.4, 0.5, 1.0, 2.0, 2.1]]).log().requires_grad_()
    weight = masked_importance_weight(trainer, torch.zeros(1, 5), floor=0.499, cap=2.001)
    torch.testing.assert_close(weight, torch.tensor([[0.0, 0.5, 1.0, 2.0, 0.0]]))
    assert not weight.requires_grad
    open_below = masked_importance_weight(trainer, torch.zeros(1, 5), floor=0.0, cap=2.001)
    torch.testing.assert_close(open_below, torch.tensor([[0.4, 0.5, 1.0, 2.0, 0.0]]))


def test_wrong_input_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"clip_low must be in \[0, 1\], got 1.5"):
        loss_of([1.0], [1.0], clip_low=1.5)
    with pytest.raises(ValueError, match="clip_high must be a finite number >= 0, got -1"):
        loss_of([1.0], [1.0], clip_high=-1.0)
    with pytest.raises(ValueError, match=r"dual_clip must be a finite number > 1, got 0\.5"):
        loss_of([1.0], [1.0], dual_clip=0.5)
    with pytest.raises(ValueError, match="drop_lower_clipped has no effect without dual_clip"):
        loss_of([1.0], [1.0], dual_clip=None, drop_lower_clipped=True)
    with pytest.raises(ValueError, match=r"normaliser must be a scalar, got shape \[2\]"):
        loss_of([1.0], [1.0], normaliser=torch.ones(2))
    with pytest.raises(ValueError, match=r"weight must have the shape of mask \[1, 1\], got \[1, 2\]"):
        loss_of([1.0], [1.0], weight=torch.ones(1, 2))
    with pytest.raises(ValueError, match="kind must be 'k1', 'k2' or 'k3', got 'k4'"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "k4")
    with pytest.raises(ValueError, match="cap must be a finite number > 0, got 0"):
        truncated_importance_weight(torch.zeros(1), torch.zeros(1), cap=0.0)
    with pytest.raises(ValueError, match=r"floor must be in \[0, cap = 2\), got 2: use 0\.5"):
        masked_importance_weight(torch.zeros(1), torch.zeros(1), floor=2.0, cap=2.0)
    with pytest.raises(ValueError, match=r"sampler_logprob must have the shape of trainer_logprob \[1\], got \[2\]"):
        masked_importance_weight(torch.zeros(1), torch.zeros(2), floor=0.5, cap=2.0)
