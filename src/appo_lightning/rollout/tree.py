"""The rollout tree: where to branch, from which prefix, and what everything earned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from appo_lightning.algorithm import (
    Criterion,
    branch_candidates,
    gamma_from_half_life,
    score_criterion,
    select_branch_points,
    share_branches,
    tool_boundary_mask,
)
from appo_lightning.batching import TraceScores, pad_rows, token_mask
from appo_lightning.errors import ConfigurationError
from appo_lightning.rewards.base import Reward
from appo_lightning.rollout.episode import Prefix
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.seeds import derive_seed
from appo_lightning.tokens import decode_tokens
from appo_lightning.types import Branch, BranchPoint, RolloutTree, Task, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class BranchingOptions:
    """How many rollouts a prompt gets and where they branch.

    Args:
        num_roots: N, independent rollouts per prompt.
        num_rollouts: M, rollouts per prompt in all; M - N of them are branches. M = N is GRPO.
        criterion: what a good place to branch is: "branching_score" (the paper), "entropy", "future_value",
            "weighted_sum", "random", "tool_boundary".
        weights: of entropy and future value in "weighted_sum", 0.5 each if null; other criteria have none.
        scope: "root" gives every root (M - N) / N branches (the paper); "prompt" takes the best M - N of the prompt
            (the published code).
        half_life: of the gain's discount, in tokens.
        clip: half-width of the clip of the future value around 1; 0 turns it off.
        gain_baseline: what the likelihood gain is measured against: "behaviour" (the paper), the policy that sampled
            the roots; or "previous", the policy of the previous rollout phase, informative in every mini-batch, at the
            cost of one more forward pass.
        noise_floor_multiple: gains below this multiple of the measured numerical difference between sampler and
            trainer count as zero; where nothing is left, entropy alone chooses.
        min_remaining: response budget in tokens that must be left after a branch point.
        keep_token: the branch keeps the token at the branch point (as published); false samples it again.
        budget: "equal" gives every prompt M - N branches; "disagreement" shares out those of all prompts that branch
            together in proportion to the spread of the roots' rewards, none where they all agree; the total stays.
            Needs scope "prompt".
        sampled_per: "mini_batch" samples the branches of each mini-batch with the policy of that moment (the paper);
            "phase" those of all prompts at once, right after the roots and with the same weights: prefixes are still in
            the engine's cache, and one wave of rollouts takes the place of many small ones. Later epochs over a phase
            meet the same branches again. A criterion that uses the gain then needs gain_baseline "previous".
        max_refills: at most so many times per phase, prompts whose roots all earn the same are replaced by other
            prompts (DAPO's dynamic sampling); what is equal after that is trained on. 0 turns it off.
    """

    num_roots: int = 8
    num_rollouts: int = 16
    criterion: Criterion = "branching_score"
    weights: tuple[float, float] | None = None
    scope: Literal["root", "prompt"] = "root"
    half_life: float = 64.0
    clip: float = 0.2
    gain_baseline: Literal["behaviour", "previous"] = "behaviour"
    noise_floor_multiple: float = 3.0
    min_remaining: int = 16
    keep_token: bool = True
    budget: Literal["equal", "disagreement"] = "equal"
    sampled_per: Literal["mini_batch", "phase"] = "mini_batch"
    max_refills: int = 0

    def __post_init__(self) -> None:
        if self.num_roots < 1:
            raise ConfigurationError(f"branching.num_roots must be at least 1, got {self.num_roots}")
        if self.num_rollouts < self.num_roots:
            raise ConfigurationError(
                f"branching.num_rollouts (M, all rollouts of a prompt) must be at least num_roots (N), "
                f"got M = {self.num_rollouts} < N = {self.num_roots}"
            )
        if self.scope == "root" and self.num_branches % self.num_roots:
            raise ConfigurationError(
                f"branching.scope = 'root' gives every root the same number of branches: num_rollouts - num_roots = "
                f"{self.num_branches} must be a multiple of num_roots = {self.num_roots}; or use scope: prompt"
            )
        if not 0 < self.half_life < math.inf:
            raise ConfigurationError(f"branching.half_life must be a positive number of tokens, got {self.half_life}")
        if not 0 <= self.clip < 1:
            raise ConfigurationError(f"branching.clip must be in [0, 1), got {self.clip}")
        if not 0 <= self.noise_floor_multiple < math.inf:
            raise ConfigurationError(
                f"branching.noise_floor_multiple must be a number >= 0, got {self.noise_floor_multiple}"
            )
        if self.min_remaining < 1:
            raise ConfigurationError(f"branching.min_remaining must be at least 1, got {self.min_remaining}")
        if self.weights is not None and self.criterion != "weighted_sum":
            raise ConfigurationError(
                f"branching.weights has no effect with criterion: {self.criterion}; remove it or use weighted_sum"
            )
        if self.weights is not None and not all(0 < weight < math.inf for weight in self.weights):
            raise ConfigurationError(
                f"branching.weights must be positive, got {self.weights}; for one term alone use criterion: entropy "
                "or future_value"
            )
        if self.gain_baseline == "previous" and not (self.num_branches and self.uses_gain):
            raise ConfigurationError(
                "branching.gain_baseline = 'previous' has no effect without branches chosen by a criterion that uses "
                "the gain; remove it"
            )
        if self.sampled_per == "phase" and not self.num_branches:
            raise ConfigurationError("branching.sampled_per = 'phase' has no effect without branches; remove it")
        if self.sampled_per == "phase" and self.uses_gain and self.gain_baseline == "behaviour":
            raise ConfigurationError(
                f"branching.sampled_per = 'phase' chooses before the policy has moved: every gain of criterion = "
                f"{self.criterion!r} against gain_baseline 'behaviour' is zero; use gain_baseline: previous, or a "
                "criterion without the gain"
            )
        if self.budget == "disagreement" and (self.scope != "prompt" or not self.num_branches):
            raise ConfigurationError(
                "branching.budget = 'disagreement' moves branches between prompts: it needs scope: prompt and "
                f"num_rollouts > num_roots, got scope {self.scope!r} and {self.num_branches} branches"
            )
        if self.max_refills < 0:
            raise ConfigurationError(f"branching.max_refills must be at least 0, got {self.max_refills}")
        if self.max_refills and self.num_roots == 1:
            raise ConfigurationError("branching.max_refills would replace every prompt: one root always equals itself")

    @property
    def num_branches(self) -> int:
        """Branches per prompt."""
        return self.num_rollouts - self.num_roots

    @property
    def uses_gain(self) -> bool:
        """Whether the criterion looks at the likelihood gain."""
        return self.criterion in ("branching_score", "future_value", "weighted_sum")


@dataclass(slots=True)
class BranchPlan:
    """Where to branch."""

    points: list[list[BranchPoint]]  # per tree; root counts within the tree, position within the response
    fallback: list[bool]  # per root of all trees: the gain was only noise, entropy alone chose


class BlankTokens:
    """Which token ids are white space only; remembers what it looked up."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._blank = torch.zeros(0, dtype=torch.int8)  # by token id: 1 blank, 0 not, -1 never looked up

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Bool tensor of the shape of ``token_ids``."""
        missing = int(token_ids.max()) + 1 - len(self._blank)
        if missing > 0:
            self._blank = torch.nn.functional.pad(self._blank, (0, missing), value=-1)
        found = self._blank[token_ids]
        if bool((found < 0).any()):
            for token in token_ids[found < 0].unique().tolist():
                self._blank[token] = not decode_tokens(self._tokenizer, [token], skip_special=True).strip()
            found = self._blank[token_ids]
        return found.bool()


def plan_branches(
    trees: Sequence[RolloutTree],
    current: TraceScores,
    base_logprobs: Tensor,
    options: BranchingOptions,
    *,
    noise_floor: float,
    max_response_tokens: int,
    is_blank: BlankTokens,
    seed: int,
) -> BranchPlan:
    """Choose the branch points of a mini-batch.

    Args:
        trees: with their roots.
        current: of the roots of all trees, by the current policy.
        base_logprobs: [n] of the same tokens by the policy that the gain is measured against.
        options: criterion and counts.
        noise_floor: measured numerical difference between sampler and trainer, nats per token.
        max_response_tokens: response budget.
        is_blank: white-space tokens are no branch points.
        seed: of the random criterion.
    """
    roots = [root for tree in trees for root in tree.roots]
    if options.num_branches == 0 or not roots:
        return BranchPlan([[] for _ in trees], [False] * len(roots))
    inside = token_mask([len(root.response_ids) for root in roots])
    mask = pad_rows([root.sampled for root in roots], inside, np.bool_)
    scored = score_criterion(
        options.criterion,
        pad_rows(current.entropies, inside),
        pad_rows(current.logprobs - base_logprobs, inside),
        mask,
        gamma=gamma_from_half_life(options.half_life),
        clip=options.clip,
        noise_floor=noise_floor,
        noise_multiple=options.noise_floor_multiple,
        weights=options.weights or (0.5, 0.5),
        after_tool=_after_tool(mask, roots) if options.criterion == "tool_boundary" else None,
        draws=pad_rows(torch.cat(_uniform_draws(trees, seed)), inside) if options.criterion == "random" else None,
    )
    candidates = branch_candidates(
        mask,
        is_blank(pad_rows([root.response_ids for root in roots], inside, np.int64)),
        max_response_tokens=max_response_tokens,
        min_remaining=options.min_remaining,
    )
    tree_of_root = [i for i, tree in enumerate(trees) for _ in tree.roots]
    count: int | list[int] = options.num_branches
    if options.scope == "root":
        count = options.num_branches // options.num_roots
    elif options.budget == "disagreement":
        count = share_branches([rewards_of(tree.roots) for tree in trees], options.num_branches * len(trees))
    chosen = select_branch_points(
        scored.score,
        scored.entropy_z,
        scored.future_value_z,
        candidates,
        torch.tensor(tree_of_root),
        count=count,
        scope=options.scope,
        eligible=scored.eligible,
    )
    plan: list[list[BranchPoint]] = [[] for _ in trees]
    first_root = list(accumulate((len(tree.roots) for tree in trees), initial=0))
    for point in chosen:
        tree_index = tree_of_root[point.root]
        point.root -= first_root[tree_index]
        plan[tree_index].append(point)
    return BranchPlan(plan, scored.fallback.tolist())


def _after_tool(mask: Tensor, roots: Sequence[Trajectory]) -> Tensor:
    return tool_boundary_mask(mask, [[call.output_stop for call in root.tool_calls] for root in roots])


def _uniform_draws(trees: Sequence[RolloutTree], seed: int) -> list[Tensor]:
    """A number in [0, 1) per response token of each root: a function of seed, task and root, whatever stands beside
    them, so that branches do not depend on how prompts are spread over processes.
    """
    return [
        torch.rand(
            len(root.response_ids),
            generator=torch.Generator().manual_seed(derive_seed(seed, tree.task.id, "criterion", n)),
        )
        for tree in trees
        for n, root in enumerate(tree.roots)
    ]


def branch_prefixes(tree: RolloutTree, points: Sequence[BranchPoint], *, keep_token: bool, seed: int) -> list[Prefix]:
    """The prefixes that branches continue: token ids, and the tool calls whose results lie inside."""
    prefixes = []
    for index, point in enumerate(points):
        root = tree.roots[point.root]
        length = point.position + (1 if keep_token else 0)
        prefixes.append(
            Prefix(
                task=tree.task,
                seed=derive_seed(seed, tree.task.id, "branch", index),
                response_ids=root.response_ids[:length],
                tool_calls=[call for call in root.tool_calls if call.output_stop <= length],
            )
        )
    return prefixes


def attach_branches(
    tree: RolloutTree, points: Sequence[BranchPoint], prefixes: Sequence[Prefix], trajectories: Sequence[Trajectory]
) -> None:
    """Hang the sampled continuations into the tree."""
    tree.branches = [
        Branch(point, trajectory, prefix_length=len(prefix.response_ids))
        for point, prefix, trajectory in zip(points, prefixes, trajectories, strict=True)
    ]


def rewards_of(trajectories: Sequence[Trajectory]) -> list[float]:
    """Rewards of scored trajectories."""
    rewards = [trajectory.reward for trajectory in trajectories if trajectory.reward is not None]
    assert len(rewards) == len(trajectories), "score trajectories first"
    return rewards


def overlong_penalty(num_tokens: int, *, max_tokens: int, buffer: int) -> float:
    """What a long response loses: 0 up to ``max_tokens - buffer`` tokens, falling to -1 at ``max_tokens``.

    Source: DAPO (arXiv 2503.14476), soft overlong punishment.
    """
    return -min(1.0, max(0.0, (num_tokens - (max_tokens - buffer)) / buffer))


def penalise_overlong(trajectories: Sequence[Trajectory], limits: RolloutLimits) -> None:
    """Add the soft penalty to scored trajectories, as the part ``overlong`` of the reward."""
    for trajectory in trajectories:
        if trajectory.reward is None:
            continue
        penalty = overlong_penalty(
            len(trajectory.response_ids), max_tokens=limits.max_response_tokens, buffer=limits.overlong_buffer
        )
        trajectory.reward += penalty
        trajectory.reward_parts["overlong"] = penalty


def score_rewards(reward: Reward, task: Task, trajectories: Sequence[Trajectory]) -> None:
    """Write reward, parts and success into trajectories; those without a value, or not finished, stay unscored."""
    for trajectory in trajectories:
        if trajectory.stop_reason == "late":
            continue
        score = reward.score(task, trajectory.response_text)
        if score.value is None:
            continue
        trajectory.reward = float(score.value)
        trajectory.reward_parts = dict(score.parts)
        trajectory.success = bool(score.success)
