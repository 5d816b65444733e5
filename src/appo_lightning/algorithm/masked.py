"""Statistics over the tokens that count, and sums over the tokens that follow.

Axes: ``B`` trajectories, ``T`` response tokens; ``...`` any leading axes. Masks are bool, True where a token counts.
Whatever stands at a masked position, NaN included, has no influence. Half precision is raised to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appo_lightning.algorithm.checks import require_above, require_gamma, require_mask

STD_EPSILON = 1e-6  # added to a standard deviation before dividing by it, as published
MAX_EXPONENT = 20.0  # log-ratios are clamped to ±20 before exp: e^20 is beyond every clip in use


def as_float(values: Tensor) -> Tensor:
    """Raise half precision and integers to float32; keep float32 and float64."""
    return values if values.dtype == torch.float64 else values.float()


def safe_exp(log_values: Tensor) -> Tensor:
    """Exponentiate with the exponent clamped to ±20: the result is finite, its gradient 0 beyond the clamp."""
    return log_values.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


def gamma_from_half_life(half_life: float) -> float:
    """Turn a half-life into a discount per token.

    gamma = 2^(-1/half_life)

    Args:
        half_life: tokens after which a contribution counts half, > 0.

    Raises:
        ConfigurationError: half_life is not a positive finite number.
    """
    require_above("half_life", half_life, 0.0, "give a number of tokens, such as 64")
    return float(2.0 ** (-1.0 / half_life))


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Average the values that count; the average of none is 0.

    Args:
        values: [..., T].
        mask: [..., T] bool.
        dim: axis to average over; None averages over everything.

    Returns:
        A scalar, or ``values`` without the axis ``dim``.

    Raises:
        ValueError: the mask is not bool.
    """
    require_mask(mask)
    kept = as_float(values).masked_fill(~mask, 0.0)
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def masked_std(values: Tensor, mask: Tensor) -> Tensor:
    """Population standard deviation over the last axis; exactly 0 where all counted values are equal.

    Args:
        values: [..., T].
        mask: [..., T] bool.

    Returns:
        [...], the last axis reduced.

    Raises:
        ValueError: the mask is not bool.
    """
    return _std(*_deviations(values, mask)).squeeze(-1)


def masked_zscore(values: Tensor, mask: Tensor, *, normalise_std: bool = True) -> Tensor:
    """Standardise the values that count over the last axis.

    z = (x - mean) / (std + 1e-6), population std; 0 at masked positions, and everywhere if all values are equal
    Source: APPO (arXiv 2606.12384), Z(.) of the Branching Score and the group-normalised advantage.

    Args:
        values: [..., T].
        mask: [..., T] bool.
        normalise_std: False subtracts the mean only.

    Returns:
        [..., T].

    Raises:
        ValueError: the mask is not bool.
    """
    deviations, number = _deviations(values, mask)
    return deviations / (_std(deviations, number) + STD_EPSILON) if normalise_std else deviations


def discounted_suffix_sum(values: Tensor, gamma: float) -> Tensor:
    """Sum what follows each token, discounted by its distance.

    S_t = sum_{k>=t} gamma^(k-t) x_k

    Doubling: once S holds the sum over a window of w tokens, S_t + gamma^w S_{t+w} holds it over 2w. So log2(T) steps
    over whole tensors, every weight is a power of gamma <= 1, nothing is divided, and errors grow as log2(T).

    Args:
        values: [..., T].
        gamma: discount per token, in (0, 1].

    Returns:
        [..., T].

    Raises:
        ConfigurationError: gamma is out of range.
    """
    require_gamma(gamma)
    total = as_float(values).clone()
    window, weight = 1, gamma
    while window < total.shape[-1]:
        total[..., :-window] += weight * total[..., window:]
        window, weight = 2 * window, weight * weight
    return total


def _deviations(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of each counted value from their mean over the last axis, 0 elsewhere; and their number [..., 1]."""
    require_mask(mask)
    values, outside = as_float(values), ~mask
    number = mask.sum(-1, keepdim=True).clamp_(min=1)
    mean = values.masked_fill(outside, 0.0).sum(-1, keepdim=True) / number
    lowest = values.masked_fill(outside, torch.inf).amin(-1, keepdim=True)
    highest = values.masked_fill(outside, -torch.inf).amax(-1, keepdim=True)
    # The mean of equal floats may be off by one rounding; divided by a tiny std, that would rank equal tokens.
    return (values - mean).masked_fill(outside | ~(highest > lowest), 0.0), number


def _std(deviations: Tensor, number: Tensor) -> Tensor:
    """Population standard deviation [..., 1], from deviations that are 0 where a value does not count."""
    return (deviations.square().sum(-1, keepdim=True) / number).sqrt()
