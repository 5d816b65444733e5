"""Rolling out one phase: its roots, and the branches of its mini-batches.

Knows no Lightning: the trainer's side comes in as a ``PhasePolicy``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from appo_lightning.batching import ProcedureBatch, TraceScores, build_batch
from appo_lightning.errors import DataError
from appo_lightning.rewards.base import Reward
from appo_lightning.rollout.episode import Prefix
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.loop import RolloutLoop
from appo_lightning.rollout.phase import Branches, Phase, Refill, behaviour_logprobs, logprob_gap, tokens_of
from appo_lightning.rollout.seeds import derive_seed
from appo_lightning.rollout.tree import (
    BlankTokens,
    BranchingOptions,
    attach_branches,
    branch_prefixes,
    penalise_overlong,
    plan_branches,
    rewards_of,
    score_rewards,
)
from appo_lightning.types import BranchPoint, RolloutTree, Task, Trajectory


class PhasePolicy(Protocol):
    """What a rollout phase needs of the trainer."""

    @property
    def version(self) -> int:
        """Grows with every change of the policy's weights."""

    def sync_sampler(self) -> None:
        """Give the sampler the current weights, if it has others."""

    def score(self, trajectories: Sequence[Trajectory], *, temperature: float) -> TraceScores:
        """Score sampled tokens with the current weights."""

    def score_previous(self, trajectories: Sequence[Trajectory], *, temperature: float) -> Tensor:
        """Log-probs [n], as of ``score``, by the weights of the previous rollout phase."""


@dataclass(slots=True)
class PhaseTimes:
    """Seconds of what happened since the last mini-batch."""

    sample_roots: float = 0.0
    sample_branches: float = 0.0
    score: float = 0.0
    sync: float = 0.0
    reward: float = 0.0


@dataclass
class PhaseRunner:
    """Samples roots and branches for one trainer.

    Args:
        loop: rollouts through the sampler and the tools.
        policy: the trainer's side.
        reward: scores finished responses.
        options: how many rollouts, where they branch.
        limits: budgets and sampling of the loop.
        seed: of the run.
        is_blank: white-space tokens.
        train_branches: branches become rows of the batch. Where they are sampled for the next update, that starts from
            the weights that sampled them: its own forward pass gives their log-probs and entropies, and none is made
            here.
        update_scores: the same holds for the roots: a phase has no branches and one update.
        progress: called with (stage, finished, total).
    """

    loop: RolloutLoop
    policy: PhasePolicy
    reward: Reward
    options: BranchingOptions
    limits: RolloutLimits
    seed: int
    is_blank: BlankTokens
    train_branches: bool = False
    update_scores: bool = False
    progress: Callable[[str, int, int], None] | None = None
    times: PhaseTimes = field(default_factory=PhaseTimes)

    def begin(self, index: int, tasks: list[Task], refill: Refill | None = None) -> Phase:
        """Sample the roots of a phase; score them with the weights that sampled them, unless the update does.

        Args:
            index: of the phase: names the seeds.
            tasks: its prompts.
            refill: gives other prompts in place of those whose roots all earn the same (``max_refills``).
        """
        self._sync()
        tasks, roots = list(tasks), self._sample_roots(index, tasks)
        refills: list[int] = []
        while refill is not None and len(refills) < self.options.max_refills:
            equal = [i for i, group in enumerate(roots) if len(set(rewards_of(group))) <= 1]
            others = refill(len(refills), len(equal)) if equal else []
            if not others:
                break
            refills.append(len(equal))
            for i, task, group in zip(equal, others, self._sample_roots(index, others), strict=False):
                tasks[i], roots[i] = task, group
        flat = [root for group in roots for root in group]
        scores = _not_yet(flat) if self.update_scores else self._score(flat)
        old = scores.split(tokens_of(roots))
        unscored = [self.options.num_roots - len(group) for group in roots]
        gap = None if self.update_scores else logprob_gap(flat, scores)
        return Phase(index, self.policy.version, tasks, roots, old, gap, refills, unscored)

    def _sample_roots(self, index: int, tasks: list[Task]) -> list[list[Trajectory]]:
        count = self.options.num_roots
        prefixes = [
            Prefix(task, derive_seed(self.seed, index, task.id, "root", n)) for task in tasks for n in range(count)
        ]
        started = time.monotonic()
        flat = self._sample("roots", prefixes)
        self.times.sample_roots += time.monotonic() - started
        roots = [flat[i * count : (i + 1) * count] for i in range(len(tasks))]
        for task, group in zip(tasks, roots, strict=True):
            self._reward(task, group)
        return [[root for root in group if root.reward is not None] for group in roots]

    def branch(self, phase: Phase) -> None:
        """Branch all prompts of a phase at once, with the weights that sampled its roots (``sampled_per``)."""
        seed = derive_seed(self.seed, phase.index, "branches")
        branches = self._branch(phase, range(len(phase.tasks)), TraceScores.joined(phase.old), seed)
        if self.train_branches:
            branches.old = self._score_branches(branches)
        phase.branches = branches

    def mini_batch(self, phase: Phase, rows: range, *, visit: int) -> ProcedureBatch:
        """Some prompts of a phase with their branches: those that the phase has, or new ones by the current policy.

        Args:
            phase: roots.
            rows: tasks of the mini-batch.
            visit: mini-batches of this phase before this one: names the seeds.
        """
        roots = [root for i in rows for root in phase.roots[i]]
        if not roots:
            raise DataError(
                f"none of the {self.options.num_roots * len(rows)} rollouts of a mini-batch could be scored: "
                f"{type(self.reward).__name__} gave no value; see that what it needs answers, then resume"
            )
        old = TraceScores.joined([phase.old[i] for i in rows])
        moved = self.policy.version != phase.policy_version
        # Without a move the current policy is the old one: nothing to compute.
        current = self._score(roots) if moved else old
        if phase.branches is None:
            branches = self._branch(phase, rows, current, derive_seed(self.seed, phase.index, visit))
        else:
            branches = phase.branches.of(rows)
        branch_old = branch_current = None
        num_scored = 0 if self.update_scores else len(roots)
        if self.train_branches:
            continued = [branch.trajectory for group in branches.sampled for branch in group]
            if branches.old is None:
                branch_old = branch_current = _not_yet(continued)
            else:
                branch_old = branch_current = TraceScores.joined(branches.old)
                num_scored += len(continued)
                if moved:
                    branch_current = self._score(continued)
        trees = [
            RolloutTree(phase.tasks[i], phase.roots[i], sampled, phase.unscored[i] + unscored)
            for i, sampled, unscored in zip(rows, branches.sampled, branches.unscored, strict=True)
        ]
        return build_batch(
            trees,
            old=old,
            current=current,
            fallback=[flag for group in branches.fallback for flag in group],
            temperature=self.limits.temperature,
            branch_old=branch_old,
            branch_current=branch_current,
            drop_overlong=self.limits.overlong == "drop",
            num_scored=num_scored,
        )

    def _branch(self, phase: Phase, rows: Sequence[int], current: TraceScores, seed: int) -> Branches:
        """Choose places in the roots of some prompts and sample from there.

        Args:
            phase: roots.
            rows: tasks.
            current: of the roots of these tasks, by the policy that samples now.
            seed: of the places and the samples.
        """
        trees = [RolloutTree(phase.tasks[i], phase.roots[i]) for i in rows]
        roots = [root for tree in trees for root in tree.roots]
        if not self.options.num_branches:
            nothing: list[list[Any]] = [[] for _ in rows]
            return Branches(nothing, [0] * len(trees), [[False] * len(tree.roots) for tree in trees])
        base = TraceScores.joined([phase.old[i] for i in rows]).logprobs
        if self.options.gain_baseline == "previous":
            started = time.monotonic()
            base = self.policy.score_previous(roots, temperature=self.limits.temperature)
            self.times.score += time.monotonic() - started
        assert phase.gap is not None
        plan = plan_branches(
            trees,
            current,
            base,
            self.options,
            noise_floor=phase.gap.rms,
            max_response_tokens=self.limits.max_response_tokens,
            is_blank=self.is_blank,
            seed=seed,
        )
        unscored = self._sample_branches(trees, plan.points, seed)
        sampled = [tree.branches for tree in trees]
        flags = iter(plan.fallback)
        return Branches(sampled, unscored, [[next(flags) for _ in tree.roots] for tree in trees])

    def _sample_branches(
        self, trees: list[RolloutTree], points: Sequence[Sequence[BranchPoint]], seed: int
    ) -> list[int]:
        """Hang branches into the trees; per tree, how many had no value."""
        self._sync()
        prefixes = [
            branch_prefixes(tree, chosen, keep_token=self.options.keep_token, seed=seed)
            for tree, chosen in zip(trees, points, strict=True)
        ]
        started = time.monotonic()
        flat = iter(self._sample("branches", [prefix for group in prefixes for prefix in group]))
        self.times.sample_branches += time.monotonic() - started
        for tree, chosen, group in zip(trees, points, prefixes, strict=True):
            attach_branches(tree, chosen, group, [next(flat) for _ in group])
            self._reward(tree.task, [branch.trajectory for branch in tree.branches])
            tree.branches = [branch for branch in tree.branches if branch.trajectory.reward is not None]
        return [len(group) - len(tree.branches) for tree, group in zip(trees, prefixes, strict=True)]

    def _sync(self) -> None:
        started = time.monotonic()
        self.policy.sync_sampler()
        self.times.sync += time.monotonic() - started

    def _sample(self, stage: str, prefixes: list[Prefix]) -> list[Trajectory]:
        report = self.progress
        return self.loop.run(
            prefixes,
            policy_version=self.policy.version,
            progress=None if report is None else lambda done, total: report(stage, done, total),
        )

    def _score(self, trajectories: list[Trajectory]) -> TraceScores:
        started = time.monotonic()
        scores = self.policy.score(trajectories, temperature=self.limits.temperature)
        self.times.score += time.monotonic() - started
        return scores

    def _score_branches(self, branches: Branches) -> list[TraceScores]:
        """Per task."""
        continued = [[branch.trajectory for branch in group] for group in branches.sampled]
        return self._score([trajectory for group in continued for trajectory in group]).split(tokens_of(continued))

    def _reward(self, task: Task, trajectories: list[Trajectory]) -> None:
        started = time.monotonic()
        score_rewards(self.reward, task, trajectories)
        if self.limits.overlong == "penalty":
            penalise_overlong(trajectories, self.limits)
        self.times.reward += time.monotonic() - started


def _not_yet(trajectories: Sequence[Trajectory]) -> TraceScores:
    """Holds the place of scores that the update gives: those of the sampler, so that nothing has moved."""
    logprobs = behaviour_logprobs(trajectories)
    return TraceScores(logprobs, torch.zeros_like(logprobs))
