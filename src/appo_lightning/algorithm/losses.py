"""What the optimiser minimises.

Axes: ``B`` trajectories, ``T`` response tokens. Masks are bool; log-probabilities in nats at the sampling temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from appo_lightning.algorithm.checks import require_above, require_at_least, require_matrices
from appo_lightning.algorithm.masked import MAX_EXPONENT, as_float, masked_mean, safe_exp
from appo_lightning.errors import ConfigurationError

MAX_K3 = 10.0  # nats; the gradient of k3 is 0 beyond, as published
KLPenalty = Literal["k1", "k2", "k3"]


@dataclass(slots=True)
class PolicyLoss:
    """The loss and what the clips did; every field a scalar, all but ``loss`` detached."""

    loss: Tensor  # carries the gradient
    clip_fraction: Tensor  # share of the sampled tokens where the clipped term replaces the plain one
    lower_clip_fraction: Tensor  # share of the sampled tokens where the dual clip binds
    approx_kl: Tensor  # nats per sampled token, mean of log pi_old - log pi: the k1 estimate of KL(old || now)
    dropped_fraction: Tensor  # share of the sampled tokens whose response left the loss


def clipped_policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    drop_lower_clipped: bool = True,
    normaliser: Tensor | None = None,
    weight: Tensor | None = None,
) -> PolicyLoss:
    """Weigh each sampled token by its advantage, within a trust region around the behaviour policy.

    r_t = exp(clamp(logprob - old_logprob, -20, 20))
    l_t = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A); where A < 0 then min(l_t, -dual_clip A)
    loss = sum_t weight_t l_t / number of tokens, over the sampled tokens of the responses that stay
    Source: PPO (arXiv 1707.06347), dual clip (arXiv 1912.09729), token mean and wider upper clip as DAPO
    (arXiv 2503.14476), dropped responses as the published APPO code (arXiv 2606.12384).

    Metrics count every sampled token, also of responses that left the loss, and ignore ``weight``.

    Args:
        logprob: [B, T] log pi_now, with gradient.
        old_logprob: [B, T] log pi_behaviour.
        advantage: [B, T], taken as a constant.
        mask: [B, T] bool, True where the policy sampled the token.
        clip_low: distance of the lower bound below 1, in [0, 1].
        clip_high: distance of the upper bound above 1, >= 0.
        dual_clip: most that a punished token may weigh, > 1; None disables it.
        drop_lower_clipped: leave out responses with more than one token at the dual clip.
        normaliser: scalar to divide by in place of the number of tokens here: the count over all ranks and
            accumulation steps (divided by the number of ranks where gradients are averaged).
        weight: [B, T] importance weights, taken as constants: see ``truncated_importance_weight`` and
            ``masked_importance_weight``.

    Raises:
        ValueError: shapes differ, or an option is out of range or without effect.
    """
    require_matrices(mask, logprob=logprob, old_logprob=old_logprob, advantage=advantage)
    _require_clips(clip_low, clip_high, dual_clip, drop_lower_clipped)

    advantage = as_float(advantage.detach()).masked_fill(~mask, 0.0)
    log_ratio = as_float(logprob) - as_float(old_logprob.detach())
    log_ratio = log_ratio.masked_fill(~mask, 0.0).clamp(-MAX_EXPONENT, MAX_EXPONENT)
    ratio = log_ratio.exp()

    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    token_loss = torch.maximum(plain, clipped)
    lower_clipped = torch.zeros_like(mask)
    if dual_clip is not None:
        ceiling = -advantage * dual_clip
        lower_clipped = (advantage < 0) & (token_loss > ceiling)
        token_loss = torch.where(advantage < 0, torch.minimum(token_loss, ceiling), token_loss)

    kept = mask
    if drop_lower_clipped:
        kept = mask & (lower_clipped.sum(dim=1, keepdim=True) <= 1)
    if weight is not None:
        require_matrices(mask, weight=weight)
        token_loss = token_loss * as_float(weight.detach()).masked_fill(~mask, 0.0)
    return PolicyLoss(
        loss=_token_mean(token_loss, kept, normaliser),
        clip_fraction=masked_mean((clipped > plain).detach(), mask),
        lower_clip_fraction=masked_mean(lower_clipped, mask),
        approx_kl=masked_mean(-log_ratio.detach(), mask),
        dropped_fraction=masked_mean(mask & ~kept, mask),
    )


def kl_penalty(logprob: Tensor, reference_logprob: Tensor, kind: KLPenalty) -> Tensor:
    """Estimate, token by token, how far the policy has left the reference.

    With d = log pi - log pi_ref: k1 = d; k2 = d^2 / 2; k3 = min(exp(-d) + d - 1, 10)
    Source: J. Schulman, "Approximating KL divergence" (2020). k1 and k3 are unbiased values of KL(pi || ref); of the
    three as loss terms on policy samples, only k2 has its gradient: k1's has mean zero, k3's is that of KL(ref || pi).
    Inputs must be finite, also at tokens that were not sampled: a NaN there would reach the gradient.

    Args:
        logprob: [B, T] log pi, nats, with gradient.
        reference_logprob: [B, T] log pi_ref, nats.
        kind: "k1", "k2" or "k3".

    Returns:
        [B, T] nats; k2 and k3 are never negative. The caller masks and averages.

    Raises:
        ValueError: shapes differ, or the kind is unknown.
    """
    if logprob.shape != reference_logprob.shape:
        raise ValueError(
            f"reference_logprob must have the shape of logprob {list(logprob.shape)}, got "
            f"{list(reference_logprob.shape)}: score both on the same tokens"
        )
    difference = as_float(logprob) - as_float(reference_logprob.detach())
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference.square()
    if kind == "k3":
        difference = difference.clamp(-MAX_EXPONENT, MAX_EXPONENT)
        # One token that the reference likes e^10 times better would otherwise outweigh the whole batch.
        return (torch.expm1(-difference) + difference).clamp(max=MAX_K3)
    raise ConfigurationError(f"kind must be 'k1', 'k2' or 'k3', got {kind!r}: 'k3' is the published choice")


def truncated_importance_weight(trainer_logprob: Tensor, sampler_logprob: Tensor, cap: float) -> Tensor:
    """Correct for the sampler and the trainer disagreeing on the same weights; no gradient.

    w_t = min(exp(trainer_logprob_t - sampler_logprob_t), cap)
    Source: truncated importance sampling, Yao et al., "Your efficient RL framework secretly brings you off-policy
    RL training" (2025).

    Args:
        trainer_logprob: [B, T] log pi_old by the trainer, nats.
        sampler_logprob: [B, T] log pi_old by the sampler, nats.
        cap: most that a token may weigh, > 0.

    Returns:
        [B, T].

    Raises:
        ValueError: shapes differ, or cap is not positive.
    """
    require_above("cap", cap, 0.0, "use 2")
    return _importance_ratio(trainer_logprob, sampler_logprob).clamp(max=cap)


def masked_importance_weight(trainer_logprob: Tensor, sampler_logprob: Tensor, *, floor: float, cap: float) -> Tensor:
    """Correct as ``truncated_importance_weight`` does, but leave out the tokens on which the two disagree too much.

    w_t = r_t if floor <= r_t <= cap else 0, r_t = exp(trainer_logprob_t - sampler_logprob_t)
    Source: token-level masking of IcePop, Ling Team, "Every step evolves" (arXiv 2510.18855).

    Args:
        trainer_logprob: [B, T] log pi_old by the trainer, nats.
        sampler_logprob: [B, T] log pi_old by the sampler, nats.
        floor: tokens that the trainer finds less likely by a smaller factor are left out, in [0, cap).
        cap: tokens that it finds likelier by a larger factor are left out, > 0.

    Returns:
        [B, T].

    Raises:
        ValueError: shapes differ, or a bound is out of range.
    """
    require_above("cap", cap, 0.0, "use 5")
    if not 0.0 <= floor < cap:
        raise ConfigurationError(f"floor must be in [0, cap = {cap:g}), got {floor:g}: use 0.5")
    ratio = _importance_ratio(trainer_logprob, sampler_logprob)
    return ratio.masked_fill((ratio < floor) | (ratio > cap), 0.0)


def _importance_ratio(trainer_logprob: Tensor, sampler_logprob: Tensor) -> Tensor:
    if trainer_logprob.shape != sampler_logprob.shape:
        raise ValueError(
            f"sampler_logprob must have the shape of trainer_logprob {list(trainer_logprob.shape)}, got "
            f"{list(sampler_logprob.shape)}: pad it at the tokens that were not sampled"
        )
    return safe_exp((as_float(trainer_logprob) - as_float(sampler_logprob)).detach())


def _token_mean(token_loss: Tensor, kept: Tensor, normaliser: Tensor | None) -> Tensor:
    """Sum over the kept tokens, divided by their number or by the caller's."""
    if normaliser is None:
        return masked_mean(token_loss, kept)
    if normaliser.numel() != 1:
        raise ValueError(f"normaliser must be a scalar, got shape {list(normaliser.shape)}: sum the counts first")
    normaliser = normaliser.detach().reshape(()).to(token_loss)
    # No token anywhere: the sum is 0 already, and 0 / 0 must not reach the weights.
    return token_loss.masked_fill(~kept, 0.0).sum() / torch.where(normaliser > 0, normaliser, 1.0)


def _require_clips(clip_low: float, clip_high: float, dual_clip: float | None, drop_lower_clipped: bool) -> None:
    if not 0.0 <= clip_low <= 1.0:
        raise ConfigurationError(f"clip_low must be in [0, 1], got {clip_low}: use 0.2")
    require_at_least("clip_high", clip_high, 0.0, "use 0.28")
    if dual_clip is not None:
        require_above("dual_clip", dual_clip, 1.0, "use 3, or null to switch it off")
    elif drop_lower_clipped:
        raise ConfigurationError(
            "drop_lower_clipped has no effect without dual_clip, got None: set dual_clip or drop_lower_clipped=False"
        )
