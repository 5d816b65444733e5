"""One rollout phase: the roots of a training step, and the branches of its mini-batches.

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
from appo_lightning.rollout.loop import Prefix, RolloutLimits, RolloutLoop
from appo_lightning.rollout.seeds import derive_seed
from appo_lightning.rollout.serialise import trajectory_from_dict, trajectory_to_dict
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

# (round, number of prompts wanted) -> other prompts; fewer where there are no more
Refill = Callable[[int, int], list[Task]]


class PhasePolicy(Protocol):
    """What a rollout phase needs of the trainer."""

    @property
    def version(self) -> int:
        """Grows with every change of the policy's weights."""

    def sync_sampler(self) -> None:
        """Give the sampler the current weights, if it has others."""

    def score(self, trajectories: Sequence[Trajectory], *, temperature: float) -> list[TraceScores]:
        """Score sampled tokens with the current weights."""

    def score_previous(self, trajectories: Sequence[Trajectory], *, temperature: float) -> list[Tensor]:
        """Log-probs [T] by the weights of the previous rollout phase."""


@dataclass(slots=True)
class PhaseTimes:
    """Seconds of what happened since the last mini-batch."""

    sample_roots: float = 0.0
    sample_branches: float = 0.0
    score: float = 0.0
    sync: float = 0.0
    reward: float = 0.0


@dataclass(slots=True)
class LogprobGap:
    """Difference between trainer and sampler on the same tokens right after a sync, nats."""

    mean: float = 0.0  # mean absolute
    rms: float = 0.0
    maximum: float = 0.0


@dataclass(slots=True)
class Phase:
    """The roots of one training step and what the old policy thought of them."""

    index: int
    policy_version: int
    tasks: list[Task]
    roots: list[list[Trajectory]]  # per task
    old: list[list[TraceScores]]  # per task, per root
    gap: LogprobGap
    refills: list[int] = field(default_factory=list)  # prompts replaced, by round
    unscored: list[int] = field(default_factory=list)  # per task, roots that could not be scored and are left out

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors: what ``weights_only`` loading accepts."""
        return {
            "index": self.index,
            "policy_version": self.policy_version,
            "task_ids": [task.id for task in self.tasks],
            "roots": [[trajectory_to_dict(root) for root in group] for group in self.roots],
            "old": [[(s.logprobs, s.entropies) for s in group] for group in self.old],
            "gap": (self.gap.mean, self.gap.rms, self.gap.maximum),
            "refills": self.refills,
            "unscored": self.unscored,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], tasks: list[Task], refill: Refill | None = None) -> Phase:
        """The phase that ``state_dict`` described.

        Args:
            state: its state.
            tasks: the same tasks, drawn again.
            refill: as in ``PhaseRunner.begin``.

        Raises:
            DataError: the tasks are others than those of the checkpoint.
        """
        refills = list(state["refills"])
        known = {task.id: task for task in tasks}
        if refill is not None:
            known |= {task.id: task for number, count in enumerate(refills) for task in refill(number, count)}
        task_ids = list(state["task_ids"])
        replaced = sum(a != b.id for a, b in zip(task_ids, tasks, strict=False))
        if len(task_ids) != len(tasks) or replaced > sum(refills) or not known.keys() >= set(task_ids):
            raise DataError(
                "the checkpoint was made in the middle of a rollout phase over other tasks; "
                "resume with the same data.train, seed and number of processes"
            )
        return cls(
            index=state["index"],
            policy_version=state["policy_version"],
            tasks=[known[task_id] for task_id in task_ids],
            refills=refills,
            unscored=list(state["unscored"]),
            roots=[[trajectory_from_dict(root) for root in group] for group in state["roots"]],
            old=[[TraceScores(*scores) for scores in group] for group in state["old"]],
            gap=LogprobGap(*state["gap"]),
        )


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
        train_branches: branches become rows of the batch.
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
    progress: Callable[[str, int, int], None] | None = None
    times: PhaseTimes = field(default_factory=PhaseTimes)

    def begin(self, index: int, tasks: list[Task], refill: Refill | None = None) -> Phase:
        """Sample the roots of a phase and score them with the weights that sampled them.

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
        scores = self._score(flat)
        remaining = iter(scores)
        old = [[next(remaining) for _ in group] for group in roots]
        unscored = [self.options.num_roots - len(group) for group in roots]
        return Phase(index, self.policy.version, tasks, roots, old, _logprob_gap(flat, scores), refills, unscored)

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

    def mini_batch(self, phase: Phase, rows: range, *, visit: int) -> ProcedureBatch:
        """Branch some prompts of a phase with the current policy.

        Args:
            phase: roots.
            rows: tasks of the mini-batch.
            visit: mini-batches of this phase before this one: names the seeds.
        """
        trees = [RolloutTree(phase.tasks[i], phase.roots[i], unscored=phase.unscored[i]) for i in rows]
        roots = [root for tree in trees for root in tree.roots]
        if not roots:
            raise DataError(
                f"none of the {self.options.num_roots * len(trees)} rollouts of a mini-batch could be scored: "
                f"{type(self.reward).__name__} gave no value; see that what it needs answers, then resume"
            )
        old = [scores for i in rows for scores in phase.old[i]]
        moved = self.policy.version != phase.policy_version
        branching = self.options.num_branches > 0
        # Without a move the current policy is the old one: nothing to compute.
        current = self._score(roots) if moved else old
        base = [scores.logprobs for scores in old]
        if branching and self.options.gain_baseline == "previous":
            started = time.monotonic()
            base = self.policy.score_previous(roots, temperature=self.limits.temperature)
            self.times.score += time.monotonic() - started
        plan = plan_branches(
            trees,
            current,
            base,
            self.options,
            noise_floor=phase.gap.rms,
            max_response_tokens=self.limits.max_response_tokens,
            is_blank=self.is_blank,
            seed=derive_seed(self.seed, phase.index, visit),
        )
        if branching:
            self._sample_branches(trees, plan.points, derive_seed(self.seed, phase.index, visit))
        branch_scores = None
        if self.train_branches:
            branch_scores = self._score([branch.trajectory for tree in trees for branch in tree.branches])
        return build_batch(
            trees,
            old=old,
            current=current,
            fallback=plan.fallback,
            temperature=self.limits.temperature,
            branch_scores=branch_scores,
            drop_overlong=self.limits.overlong == "drop",
        )

    def _sample_branches(self, trees: list[RolloutTree], points: Sequence[Sequence[BranchPoint]], seed: int) -> None:
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
            tree.unscored += len(group) - len(tree.branches)

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

    def _score(self, trajectories: list[Trajectory]) -> list[TraceScores]:
        started = time.monotonic()
        scores = self.policy.score(trajectories, temperature=self.limits.temperature)
        self.times.score += time.monotonic() - started
        return scores

    def _reward(self, task: Task, trajectories: list[Trajectory]) -> None:
        started = time.monotonic()
        score_rewards(self.reward, task, trajectories)
        if self.limits.overlong == "penalty":
            penalise_overlong(trajectories, self.limits)
        self.times.reward += time.monotonic() - started


def _logprob_gap(trajectories: Sequence[Trajectory], scores: Sequence[TraceScores]) -> LogprobGap:
    gaps = [
        (score.logprobs - torch.tensor(trajectory.behaviour_logprobs))[torch.tensor(trajectory.sampled)]
        for trajectory, score in zip(trajectories, scores, strict=True)
    ]
    gap = torch.cat(gaps).double() if gaps else torch.zeros(0)
    if gap.numel() == 0:
        return LogprobGap()
    return LogprobGap(float(gap.abs().mean()), float(gap.square().mean().sqrt()), float(gap.abs().max()))
