import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from appo_lightning.algorithm import (
    discounted_suffix_sum,
    gamma_from_half_life,
    masked_mean,
    masked_std,
    masked_zscore,
)


def suffix_sum_by_loop(values, gamma):
    total, carry = torch.zeros_like(values), torch.zeros_like(values[..., 0])
    for t in reversed(range(values.shape[-1])):
        carry = values[..., t] + gamma * carry
        total[..., t] = carry
    return total


def test_suffix_sum_discounts_by_distance():
    # 4 + 0.5*0 + 0.25*8 = 6;  0 + 0.5*8 = 4;  8
    assert discounted_suffix_sum(torch.tensor([[4.0, 0.0, 8.0]]), 0.5).tolist() == [[6.0, 4.0, 8.0]]


@given(
    length=st.integers(1, 70),
    gamma=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**16),
)
def test_suffix_sum_equals_the_loop(length, gamma, seed):
    values = torch.randn(2, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(discounted_suffix_sum(values, gamma), suffix_sum_by_loop(values, gamma))


@pytest.mark.parametrize("gamma", [1.0, gamma_from_half_life(4096), gamma_from_half_life(64), 0.5, 1e-6])
def test_suffix_sum_is_accurate_in_float32_over_long_responses(gamma):
    values = 0.01 * torch.randn(1, 32768, generator=torch.Generator().manual_seed(0))
    exact = suffix_sum_by_loop(values.double(), gamma)
    error = (discounted_suffix_sum(values, gamma) - exact).abs().max()
    assert error < 2e-6 * max(1.0, float(exact.abs().max()))


def test_suffix_sum_raises_half_precision():
    assert discounted_suffix_sum(torch.ones(1, 300, dtype=torch.bfloat16), 1.0)[0, 0] == 300.0


def test_suffix_sum_has_the_gradient_of_its_formula():
    values = torch.zeros(4, requires_grad=True)
    discounted_suffix_sum(values, 0.5)[0].backward()
    assert values.grad.tolist() == [1.0, 0.5, 0.25, 0.125]


@pytest.mark.parametrize("gamma", [0.0, -0.1, 1.3, math.nan])
def test_gamma_outside_its_range_is_refused(gamma):
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 1\], got"):
        discounted_suffix_sum(torch.zeros(1, 2), gamma)


def test_half_life_halves():
    assert gamma_from_half_life(64) ** 64 == pytest.approx(0.5)
    with pytest.raises(ValueError, match="half_life must be a finite number > 0, got 0"):
        gamma_from_half_life(0)


def test_masked_statistics_ignore_what_is_masked():
    values = torch.tensor([[1.0, math.nan, 3.0, math.inf]])
    mask = torch.tensor([[True, False, True, False]])
    assert masked_mean(values, mask).item() == 2.0
    assert masked_mean(values, mask, dim=0).tolist() == [1.0, 0.0, 3.0, 0.0]
    # mean 2, squared deviations 1 and 1, population variance 1
    assert masked_std(values, mask).tolist() == [1.0]
    torch.testing.assert_close(masked_zscore(values, mask), torch.tensor([[-1.0, 0.0, 1.0, 0.0]]), rtol=0, atol=2e-6)


def test_statistics_of_nothing_are_zero():
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    values = torch.full((1, 3), math.nan)
    assert masked_mean(values, nothing).item() == 0.0
    assert masked_std(values, nothing).tolist() == [0.0]
    assert masked_zscore(values, nothing).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("value", [0.8, 1.2, 1 / 3, 1e-7, 12345.678])
def test_equal_values_have_no_zscore_whatever_the_rounding(value):
    values = torch.full((1, 4097), value)
    assert not masked_zscore(values, torch.ones_like(values).bool()).any()


def test_a_float_mask_is_refused():
    with pytest.raises(ValueError, match=r"mask must be bool, got torch.float32: pass mask.bool\(\)"):
        masked_mean(torch.zeros(2), torch.ones(2))
