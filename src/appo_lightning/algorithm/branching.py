"""Where a root is worth a second continuation.

Axes: ``B`` roots, ``T`` response tokens. Masks are bool. Log-probabilities and entropies are in nats and aligned with
token positions: pad them at tokens that were not sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from appo_lightning.algorithm.checks import require_at_least, require_finite, require_mask, require_matrices
from appo_lightning.algorithm.masked import discounted_suffix_sum, masked_zscore, safe_exp
from appo_lightning.errors import ConfigurationError
from appo_lightning.types import BranchPoint

Scope = Literal["root", "prompt"]


@dataclass(slots=True)
class BranchingScore:
    """The Branching Score and its two factors."""

    score: Tensor  # [B, T] product of the two z-scores; 0 where not sampled
    entropy_z: Tensor  # [B, T] z-score of the entropy over the sampled tokens of the root
    future_value_z: Tensor  # [B, T] z-score of the future value over the sampled tokens of the root


def future_value(log_ratio: Tensor, mask: Tensor, *, gamma: float, clip: float) -> Tensor:
    """Measure how much likelier the policy now finds what follows each token.

    Omega_t = clip(exp(sum_{k>=t} gamma^(k-t) m_k log_ratio_k), 1 - clip, 1 + clip)
    Source: APPO (arXiv 2606.12384), future value of the Branching Score. Distance counts all tokens, sampled or not.

    Args:
        log_ratio: [B, T] log pi_now - log pi_base, nats.
        mask: [B, T] bool, True where the policy sampled the token.
        gamma: discount per token, in (0, 1].
        clip: half-width of the clip around 1; 0 disables it.

    Returns:
        [B, T], defined at every position.

    Raises:
        ValueError: shapes differ, gamma is out of range, or clip is negative.
    """
    require_matrices(mask, log_ratio=log_ratio)
    require_at_least("clip", clip, 0.0, "use 0.2, or 0 for no clip")
    value = safe_exp(discounted_suffix_sum(log_ratio.masked_fill(~mask, 0.0), gamma))
    return value.clamp(1.0 - clip, 1.0 + clip) if clip > 0 else value


def branching_score(entropy: Tensor, log_ratio: Tensor, mask: Tensor, *, gamma: float, clip: float) -> BranchingScore:
    """Score each sampled token as a place to branch.

    score_t = z(entropy_t) * z(clip(exp(sum_{k>=t} gamma^(k-t) log_ratio_k)))
    Source: APPO (arXiv 2606.12384), Branching Score.

    Args:
        entropy: [B, T] nats, full vocabulary.
        log_ratio: [B, T] log pi_now - log pi_base, nats.
        mask: [B, T] bool, True where the policy sampled the token.
        gamma: discount per token, in (0, 1].
        clip: half-width of the clip around 1; 0 disables it.

    Raises:
        ValueError: shapes differ, gamma is out of range, or clip is negative.
    """
    require_matrices(mask, entropy=entropy, log_ratio=log_ratio)
    entropy_z = masked_zscore(entropy, mask)
    future_value_z = masked_zscore(future_value(log_ratio, mask, gamma=gamma, clip=clip), mask)
    return BranchingScore(entropy_z * future_value_z, entropy_z, future_value_z)


def branch_candidates(mask: Tensor, blank: Tensor, *, max_response_tokens: int, min_remaining: int) -> Tensor:
    """Mark the tokens after which a second continuation is possible at all.

    A candidate is sampled, not blank, not the last sampled token of its root, and leaves a continuation at least
    ``min_remaining`` of ``max_response_tokens``.
    Source: APPO (arXiv 2606.12384), selection of branch points; the budget rule is ours.

    Args:
        mask: [B, T] bool, True where the policy sampled the token; column 0 is the first response token.
        blank: [B, T] bool, True where the token decodes to white space or nothing.
        max_response_tokens: length at which a response is cut, tool results included.
        min_remaining: tokens that a continuation must have left, >= 1.

    Returns:
        [B, T] bool.

    Raises:
        ValueError: shapes differ, a mask is not bool, or an option is below 1.
    """
    require_matrices(mask, blank=blank)
    require_mask(blank, "blank")
    require_at_least("max_response_tokens", max_response_tokens, 1, "give the response budget of the rollouts")
    require_at_least("min_remaining", min_remaining, 1, "a branch needs a token to differ in")
    position = torch.arange(mask.shape[1], device=mask.device)
    last_sampled = torch.where(mask, position, -1).amax(dim=1, keepdim=True)
    # The prefix keeps token t, so a continuation starts with t + 1 tokens of the budget spent.
    enough_budget = max_response_tokens - (position + 1) >= min_remaining
    return mask & ~blank & (position < last_sampled) & enough_budget


def select_branch_points(
    score: Tensor,
    entropy_z: Tensor,
    future_value_z: Tensor,
    candidate_mask: Tensor,
    root_prompt: Tensor,
    *,
    count: int | Sequence[int],
    scope: Scope,
    eligible: Tensor | None = None,
) -> list[BranchPoint]:
    """Take the best candidates of each root or of each prompt.

    Only candidates with both z-scores positive are taken, so that a product of two negatives never wins; ``eligible``
    replaces that gate. Ties break by position, then root. No duplicates: fewer candidates mean fewer branches.
    Source: APPO (arXiv 2606.12384), top-B tokens of each root; scope "prompt" is the published code.

    Args:
        score: [B, T].
        entropy_z: [B, T].
        future_value_z: [B, T].
        candidate_mask: [B, T] bool.
        root_prompt: [B] equal entries belong to one prompt.
        count: most branch points per root or per prompt, >= 0; a sequence gives each root or prompt its own, in the
            order of their first row.
        scope: "root" or "prompt".
        eligible: [B, T] bool, where the criterion allows a branch (``CriterionScore.eligible``); None: both z > 0.

    Returns:
        Branch points, roots or prompts in the order of their first row, the best first within each.

    Raises:
        ValueError: shapes differ, a candidate's score is NaN or infinite, or an option is unknown.
    """
    require_matrices(candidate_mask, score=score, entropy_z=entropy_z, future_value_z=future_value_z)
    if root_prompt.shape != score.shape[:1]:
        raise ValueError(
            f"root_prompt must be [B] = [{score.shape[0]}], got {list(root_prompt.shape)}: give each root its prompt"
        )
    if eligible is None:
        eligible = (entropy_z > 0) & (future_value_z > 0)
    require_matrices(candidate_mask, eligible=eligible)
    require_mask(eligible, "eligible")
    allowed = candidate_mask & eligible
    require_finite("score", score[allowed])

    group_of_root, num_groups = _groups(root_prompt, scope)
    limits = [count] * num_groups if isinstance(count, int) else list(count)
    for limit in limits or ([count] if isinstance(count, int) else []):
        require_at_least("count", limit, 0, "give the number of branches per root or prompt")
    if len(limits) != num_groups:
        raise ValueError(f"count must have {num_groups} entries, got {len(limits)}: one for each root or prompt")
    # Transposed, so that candidates are listed by position, then root: stable sorts keep that order in ties.
    position, root = allowed.T.nonzero(as_tuple=True)
    best = score[root, position].sort(descending=True, stable=True).indices
    best = best[group_of_root[root[best]].sort(stable=True).indices]
    root, position = root[best], position[best]
    group = group_of_root[root]
    sizes = group.bincount(minlength=num_groups)
    rank = torch.arange(len(group), device=group.device) - (sizes.cumsum(0) - sizes)[group]
    chosen = rank < torch.tensor(limits, dtype=torch.long, device=group.device)[group]
    root, position = root[chosen], position[chosen]
    columns = (root, position, score[root, position], entropy_z[root, position], future_value_z[root, position])
    return [BranchPoint(*fields) for fields in zip(*(column.tolist() for column in columns), strict=True)]


def share_branches(rewards: Sequence[Sequence[float]], total: int) -> list[int]:
    """Give the branches of a mini-batch to the prompts whose roots disagree.

    A prompt's share is proportional to the population standard deviation of its roots' rewards, rounded so that the
    shares sum to ``total``: the largest remainders are rounded up, ties by position. Where no roots disagree, all
    prompts share alike. Source: ours; a branch of a prompt whose roots all earn the same has little to tell.

    Args:
        rewards: of the roots, per prompt.
        total: branches of all prompts.

    Returns:
        Branches per prompt.
    """
    spread = [float(torch.tensor(group, dtype=torch.float64).std(correction=0)) if group else 0.0 for group in rewards]
    if sum(spread) == 0:
        spread = [1.0] * len(rewards)
    quotas = [total * value / sum(spread) for value in spread]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: shares[i] - quotas[i])  # stable: ties by position
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _groups(root_prompt: Tensor, scope: Scope) -> tuple[Tensor, int]:
    """[B] number of the budget that each row shares, in the order of their first row; and how many there are."""
    if scope == "root":
        return torch.arange(len(root_prompt), device=root_prompt.device), len(root_prompt)
    if scope != "prompt":
        raise ConfigurationError(f"scope must be 'root' or 'prompt', got {scope!r}: 'root' is the paper")
    prompts = root_prompt.tolist()
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    numbered = torch.tensor([numbers[prompt] for prompt in prompts], dtype=torch.long, device=root_prompt.device)
    return numbered, len(numbers)
