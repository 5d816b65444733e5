"""Who earned the reward: advantages from two groups, and their procedure-level scaling.

Axes: ``B`` roots, ``K`` branches, ``T`` response tokens. Masks are bool. Rewards and advantages have no unit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from appo_lightning.algorithm.checks import (
    require_above,
    require_at_least,
    require_finite,
    require_matrices,
    require_rows,
    require_vectors,
)
from appo_lightning.algorithm.masked import MAX_EXPONENT, as_float, discounted_suffix_sum, masked_zscore, safe_exp
from appo_lightning.errors import ConfigurationError

UNCLIPPED_INFLUENCE = 10.0  # upper bound of the influence where its clip is switched off, as published
SAFE_INFLUENCE = (0.8, 1.0)  # range of the influence on punished tokens that have become far likelier, as published


def group_advantage(reward: Tensor, group: Tensor, *, normalise_std: bool = True) -> Tensor:
    """Compare each reward with the others of its group.

    A_i = (R_i - mean) / (std + 1e-6), population std; exactly 0 in a group of one or of equal rewards
    Source: GRPO (arXiv 2402.03300); without the division, Dr. GRPO (arXiv 2503.20783).

    Args:
        reward: [N].
        group: [N] equal entries belong to one group.
        normalise_std: False drops the division.

    Returns:
        [N].

    Raises:
        ValueError: lengths differ, or a reward is not finite.
    """
    require_vectors("trajectories", reward=reward, group=group)
    require_finite("reward", reward)
    if not len(reward):
        return as_float(reward)
    same_group = group.unsqueeze(1) == group.unsqueeze(0)
    return masked_zscore(reward.expand_as(same_group), same_group, normalise_std=normalise_std).diagonal().clone()


def dual_group_advantage(
    root_reward: Tensor,
    root_prompt: Tensor,
    mask: Tensor,
    branch_reward: Tensor,
    branch_root: Tensor,
    branch_position: Tensor,
    *,
    normalise_std: bool = True,
) -> Tensor:
    """Credit root tokens with the outcome of their root and of the branches that share them.

    A_{n,t} = m_{n,t} (A^root_n + mean over the branches b of n with position_b >= t of A^branch_b)
    Each of the two is normalised in its own group: the roots, and the branches, of one prompt. The mean over no
    branches is 0.
    Source: APPO (arXiv 2606.12384), dual-group advantage.

    Args:
        root_reward: [B].
        root_prompt: [B] equal entries belong to one prompt.
        mask: [B, T] bool, True where the policy sampled the token.
        branch_reward: [K].
        branch_root: [K] row of the root, int64.
        branch_position: [K] last token that branch and root share, int64.
        normalise_std: False drops the divisions by the standard deviation.

    Returns:
        [B, T], 0 where not sampled.

    Raises:
        ValueError: shapes differ, a reward is not finite, or an index is out of range.
    """
    require_matrices(mask)
    num_roots, num_tokens = mask.shape
    if root_reward.shape != (num_roots,):
        raise ValueError(f"root_reward must be [B] = [{num_roots}], got {list(root_reward.shape)}: give one per root")
    require_vectors("branches", branch_reward=branch_reward, branch_root=branch_root, branch_position=branch_position)
    require_rows("branch_root", branch_root, num_roots)
    require_rows("branch_position", branch_position, num_tokens)

    root = group_advantage(root_reward, root_prompt, normalise_std=normalise_std)
    branch = group_advantage(branch_reward, root_prompt[branch_root], normalise_std=normalise_std).to(root.dtype)
    where = (branch_root, branch_position)
    leaving = root.new_zeros(2, num_roots, num_tokens)
    for sums, values in zip(leaving, (branch, torch.ones_like(branch)), strict=True):
        sums.index_put_(where, values, accumulate=True)
    # A token is shared by the branches that leave at it or later: sums over the tokens that follow.
    total, number = discounted_suffix_sum(leaving, 1.0)
    # Tool tokens were not chosen by the policy: no credit.
    return (root.unsqueeze(1) + total / number.clamp(min=1.0)).masked_fill(~mask, 0.0)


def branch_advantage(
    branch_reward: Tensor, branch_prompt: Tensor, mask: Tensor, *, normalise_std: bool = True
) -> Tensor:
    """Credit the branches' own tokens with the outcome of their branch.

    A_{b,t} = m_{b,t} A^branch_b
    For ``train_branches``; the paper leaves these tokens out of the loss.

    Args:
        branch_reward: [K].
        branch_prompt: [K] equal entries belong to one prompt: ``root_prompt[branch_root]``.
        mask: [K, T] bool, True where the branch sampled the token itself, False on the prefix of its root.
        normalise_std: False drops the division by the standard deviation.

    Returns:
        [K, T], 0 where not sampled.

    Raises:
        ValueError: shapes differ, or a reward is not finite.
    """
    require_matrices(mask)
    if branch_reward.shape != mask.shape[:1]:
        raise ValueError(f"branch_reward must be [K] = [{len(mask)}], got {list(branch_reward.shape)}: one per branch")
    advantage = group_advantage(branch_reward, branch_prompt, normalise_std=normalise_std)
    return advantage.unsqueeze(1).expand_as(mask).masked_fill(~mask, 0.0)


@torch.no_grad()
def future_influence(
    log_ratio: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    clip: float,
    high_only: bool,
    dual_clip: float,
    safety_threshold: float | None,
) -> Tensor:
    """Measure how far the tokens after each token have moved since they were sampled; no gradient.

    D_t = sum_{k>=t} gamma^(k-t) m_k 1[log_ratio_k <= log dual_clip] log_ratio_k
    A_t = clip(exp(D_t), lo, 1 + clip), lo = 1 if high_only else 1 - clip; clip = 0 means clip at 10
    where advantage < 0 and exp(log_ratio_t) > safety_threshold: A_t is then clamped to [0.8, 1]
    Source: APPO (arXiv 2606.12384), procedure-level advantage scaling; FIPO (future-KL influence).

    Args:
        log_ratio: [B, T] log pi_now - log pi_behaviour, nats.
        advantage: [B, T].
        mask: [B, T] bool, True where the policy sampled the token.
        gamma: discount per token, in (0, 1].
        clip: half-width of the clip around 1, >= 0.
        high_only: never scale below 1.
        dual_clip: tokens whose ratio exceeds it leave the sum; > 1.
        safety_threshold: ratio above which a punished token is not punished further; None disables it.

    Returns:
        [B, T], float32 or wider; defined at every position.

    Raises:
        ValueError: shapes differ, or an option is out of range or without effect.
    """
    require_matrices(mask, log_ratio=log_ratio, advantage=advantage)
    require_above("dual_clip", dual_clip, 1.0, "use 3")
    require_at_least("clip", clip, 0.0, "use 0.2, or 0 to clip at 10 only")
    if high_only and clip == 0:
        raise ConfigurationError("high_only has no effect without a clip, got clip 0: set clip or high_only=False")
    log_ratio = as_float(log_ratio).masked_fill(~mask, 0.0).clamp(-MAX_EXPONENT, MAX_EXPONENT)
    moved = log_ratio.masked_fill(log_ratio > math.log(dual_clip), 0.0)
    influence = safe_exp(discounted_suffix_sum(moved, gamma))
    if clip > 0:
        influence = influence.clamp(1.0 if high_only else 1.0 - clip, 1.0 + clip)
    else:
        influence = influence.clamp(max=UNCLIPPED_INFLUENCE)
    if safety_threshold is None:
        return influence
    require_above("safety_threshold", safety_threshold, 0.0, "use 6, or null to switch it off")
    runaway = (advantage < 0) & (log_ratio.exp() > safety_threshold)
    return torch.where(runaway, influence.clamp(*SAFE_INFLUENCE), influence)


def scale_by_influence(advantage: Tensor, influence: Tensor, *, weight: float = 1.0, centred: bool = False) -> Tensor:
    """Scale each token's advantage by the influence of its future.

    A_t (1 + weight * influence_t), as published; centred: A_t (1 + weight * (influence_t - 1))
    Source: APPO (arXiv 2606.12384), procedure-level advantage scaling; ``centred`` is ours.

    The published factor is nearly a constant: within [2, 2.2] at clip 0.2, high only. The centred factor is 1 where
    nothing is known about the future.

    Args:
        advantage: [B, T].
        influence: [B, T] from ``future_influence``.
        weight: strength, >= 0; 0 leaves the advantage as it is.
        centred: measure the influence from 1.

    Returns:
        [B, T].

    Raises:
        ValueError: shapes differ, or weight is negative.
    """
    if advantage.shape != influence.shape:
        raise ValueError(
            f"influence must have the shape of advantage {list(advantage.shape)}, got {list(influence.shape)}: "
            "compute both from the same batch"
        )
    require_at_least("weight", weight, 0.0, "use 1, or 0 for no scaling")
    return advantage * (1.0 + weight * (influence - 1.0 if centred else influence))
