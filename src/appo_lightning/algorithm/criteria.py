"""The ways to rank tokens as branch points, and what to do when the likelihood gain is only noise.

Axes: ``B`` roots, ``T`` response tokens. Masks are bool, nats throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from appo_lightning.algorithm.branching import branching_score
from appo_lightning.algorithm.checks import require_above, require_at_least, require_mask, require_matrices
from appo_lightning.algorithm.masked import masked_std
from appo_lightning.errors import ConfigurationError

Criterion = Literal["branching_score", "entropy", "future_value", "weighted_sum", "random", "tool_boundary"]
GAIN_CRITERIA = frozenset({"branching_score", "future_value", "weighted_sum"})  # they fall back where it is noise


@dataclass(slots=True)
class CriterionScore:
    """How a criterion ranks the tokens of each root and where it allows a branch."""

    score: Tensor  # [B, T] higher is better; 0 where not sampled
    entropy_z: Tensor  # [B, T] z-score of the entropy
    future_value_z: Tensor  # [B, T] z-score of the future value; 0 on roots that fell back
    eligible: Tensor  # [B, T] bool, the gate of the criterion; pass it to select_branch_points
    fallback: Tensor  # [B] bool, roots ranked by entropy alone because their gain says nothing


def score_criterion(
    criterion: Criterion,
    entropy: Tensor,
    log_ratio: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    clip: float,
    noise_floor: float = 0.0,
    noise_multiple: float = 3.0,
    weights: tuple[float, float] = (1.0, 1.0),
    after_tool: Tensor | None = None,
    draws: Tensor | None = None,
) -> CriterionScore:
    """Rank the sampled tokens of each root by one criterion.

    criterion         score                         eligible where            may fall back
    branching_score   z(H) z(Omega)                 z(H) > 0, z(Omega) > 0    yes
    future_value      z(Omega)                      z(Omega) > 0              yes
    weighted_sum      w_H z(H) + w_Omega z(Omega)   score > 0                 yes
    entropy           z(H)                          z(H) > 0                  no
    random            ``draws``                     sampled                   no
    tool_boundary     1                             ``after_tool``, sampled   no

    The gate of a criterion that ranks by z-scores keeps the tokens that it finds better than the average token of the
    root. A root falls back to ``entropy`` where its gain carries no information: it is within the noise, see
    ``suppress_noise``, or every future value hit the same clip bound. Equal scores take the earliest tokens.
    Source: APPO (arXiv 2606.12384), Branching Score, its ablations and appendix; the fallback is ours.

    Args:
        criterion: one of the names above.
        entropy: [B, T] nats, full vocabulary.
        log_ratio: [B, T] log pi_now - log pi_base, nats.
        mask: [B, T] bool, True where the policy sampled the token.
        gamma: discount per token, in (0, 1].
        clip: half-width of the clip of the future value around 1; 0 disables it.
        noise_floor: nats, std of the log-prob mismatch between sampler and trainer.
        noise_multiple: gains below this multiple of the floor count as zero.
        weights: (w_H, w_Omega) of ``weighted_sum``, both > 0.
        after_tool: [B, T] bool, needed by ``tool_boundary``: see ``tool_boundary_mask``.
        draws: [B, T] uniform in [0, 1), needed by ``random``.

    Raises:
        ValueError: shapes differ, an option is out of range, or the criterion misses its input.
    """
    if criterion not in get_args(Criterion):
        raise ConfigurationError(f"criterion must be one of {', '.join(get_args(Criterion))}, got {criterion!r}")
    log_ratio, degenerate = suppress_noise(log_ratio, mask, noise_floor=noise_floor, noise_multiple=noise_multiple)
    scored = branching_score(entropy, log_ratio, mask, gamma=gamma, clip=clip)
    entropy_z = scored.entropy_z
    future_value_z = scored.future_value_z.masked_fill(degenerate.unsqueeze(1), 0.0)
    if criterion in GAIN_CRITERIA:
        score, eligible = _rank_by_gain(criterion, entropy_z, future_value_z, weights)
        # A z-score that is 0 everywhere ranks nothing, be it by noise or because every value hit the same clip bound.
        fallback = (future_value_z == 0).all(dim=1) & mask.any(dim=1)
        score = torch.where(fallback.unsqueeze(1), entropy_z, score)
        eligible = torch.where(fallback.unsqueeze(1), entropy_z > 0, eligible)
    else:
        score, eligible = _rank_without_gain(criterion, entropy_z, mask, after_tool, draws)
        fallback = torch.zeros_like(degenerate)
    return CriterionScore(score, entropy_z, future_value_z, eligible, fallback)


def suppress_noise(
    log_ratio: Tensor, mask: Tensor, *, noise_floor: float, noise_multiple: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Zero the likelihood gains that numerical mismatch explains, and find the roots where nothing else is left.

    gain_t = log_ratio_t if |log_ratio_t| >= noise_multiple * noise_floor else 0
    degenerate = std over the sampled tokens of log_ratio <= noise_floor, or no gain is left

    Right after a weight sync the gain is zero but for the difference between the sampler's and the trainer's kernels;
    that noise must never choose a branch.

    Args:
        log_ratio: [B, T] log pi_now - log pi_base, nats.
        mask: [B, T] bool, True where the policy sampled the token.
        noise_floor: nats, measured: the std of the same difference right after a sync.
        noise_multiple: how many floors a gain must reach to count.

    Returns:
        The gains [B, T], 0 where not sampled, and the degenerate roots [B] bool.

    Raises:
        ValueError: shapes differ, or an option is negative.
    """
    require_matrices(mask, log_ratio=log_ratio)
    require_at_least("noise_floor", noise_floor, 0.0, "measure it right after a sync, or use 0")
    require_at_least("noise_multiple", noise_multiple, 0.0, "use 3, or 0 to keep every gain")
    gain = log_ratio.masked_fill(~mask | (log_ratio.abs() < noise_multiple * noise_floor), 0.0)
    return gain, (masked_std(log_ratio, mask) <= noise_floor) | (gain == 0).all(dim=1)


def tool_boundary_mask(mask: Tensor, result_stops: Sequence[Sequence[int]]) -> Tensor:
    """Mark the first sampled token after each tool result.

    Args:
        mask: [B, T] bool, True where the policy sampled the token.
        result_stops: per root, the position after the last token of each result (``ToolCall.output_stop``).

    Returns:
        [B, T] bool.

    Raises:
        ValueError: the number of roots differs, or a position lies outside [0, T].
    """
    require_matrices(mask)
    if len(result_stops) != len(mask):
        raise ValueError(f"result_stops must have {len(mask)} entries, got {len(result_stops)}: give one list per root")
    boundary = torch.zeros_like(mask)
    for row, stops in enumerate(result_stops):
        for stop in stops:
            if not 0 <= stop <= mask.shape[1]:
                raise ValueError(f"a result must stop within [0, {mask.shape[1]}], got {stop}: count response tokens")
            following = mask[row, stop:].nonzero()
            if len(following):
                boundary[row, stop + int(following[0])] = True
    return boundary


def _rank_by_gain(
    criterion: Criterion, entropy_z: Tensor, future_value_z: Tensor, weights: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Score and gate of the criteria that read the likelihood gain."""
    if criterion == "branching_score":
        return entropy_z * future_value_z, (entropy_z > 0) & (future_value_z > 0)
    if criterion == "future_value":
        return future_value_z, future_value_z > 0
    for name, weight in zip(("w_H", "w_Omega"), weights, strict=True):
        require_above(name, weight, 0.0, "use the criterion 'entropy' or 'future_value' for one term alone")
    score = weights[0] * entropy_z + weights[1] * future_value_z
    return score, score > 0


def _rank_without_gain(
    criterion: Criterion,
    entropy_z: Tensor,
    mask: Tensor,
    after_tool: Tensor | None,
    draws: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Score and gate of the criteria that ignore the likelihood gain."""
    if criterion == "entropy":
        return entropy_z, entropy_z > 0
    if criterion == "random":
        if draws is None:
            raise ConfigurationError("random needs draws, got None: pass uniform numbers, one per token")
        require_matrices(mask, draws=draws)
        return draws.to(entropy_z).masked_fill(~mask, 0.0), mask
    if after_tool is None:
        raise ConfigurationError("tool_boundary needs after_tool, got None: pass tool_boundary_mask(mask, stops)")
    require_matrices(mask, after_tool=after_tool)
    require_mask(after_tool, "after_tool")
    boundary = after_tool & mask
    return boundary.to(entropy_z.dtype), boundary
