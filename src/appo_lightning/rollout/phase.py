"""What a rollout phase holds, and how it is saved: the roots of some training steps, and branches if it has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from appo_lightning.batching import TraceScores
from appo_lightning.errors import DataError
from appo_lightning.rollout.serialise import (
    branches_from_state,
    branches_to_state,
    trajectories_from_state,
    trajectories_to_state,
)
from appo_lightning.types import Branch, Task, Trajectory

V = TypeVar("V")
# (round, number of prompts wanted) -> other prompts; fewer where there are no more
Refill = Callable[[int, int], list[Task]]


@dataclass(slots=True)
class LogprobGap:
    """Difference between trainer and sampler on the same tokens right after a sync, nats."""

    mean: float = 0.0  # mean absolute
    rms: float = 0.0
    maximum: float = 0.0

    @classmethod
    def of(cls, differences: Tensor) -> LogprobGap:
        """Of the differences [n] of some tokens."""
        if differences.numel() == 0:
            return cls()
        gap = differences.double()
        return cls(float(gap.abs().mean()), float(gap.square().mean().sqrt()), float(gap.abs().max()))


def logprob_gap(trajectories: Sequence[Trajectory], scores: TraceScores) -> LogprobGap:
    """The gap on the sampled tokens of some trajectories, scored by the weights that sampled them."""
    sampled = np.fromiter(chain.from_iterable(t.sampled for t in trajectories), np.bool_)
    return LogprobGap.of((scores.logprobs - behaviour_logprobs(trajectories))[torch.from_numpy(sampled)])


def behaviour_logprobs(trajectories: Sequence[Trajectory]) -> Tensor:
    """[n] log-probs by the sampler of the response tokens of some trajectories, one after the other."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(t.behaviour_logprobs for t in trajectories), np.float32))


def tokens_of(groups: Sequence[Sequence[Trajectory]]) -> list[int]:
    """Response tokens of each group."""
    return [sum(len(trajectory.response_ids) for trajectory in group) for group in groups]


@dataclass(slots=True)
class Branches:
    """The branches of some prompts, and how their places were found."""

    sampled: list[list[Branch]]  # per task; those without a value are left out
    unscored: list[int]  # per task, branches left out
    fallback: list[list[bool]]  # per task, per root: the gain was only noise, entropy alone chose
    old: list[TraceScores] | None = None  # per task, of its branches, by the weights that sampled them; None: unknown

    def of(self, rows: Sequence[int]) -> Branches:
        """Those of some of the prompts."""
        old = None if self.old is None else [self.old[i] for i in rows]
        return Branches(
            [self.sampled[i] for i in rows], [self.unscored[i] for i in rows], [self.fallback[i] for i in rows], old
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors: what ``weights_only`` loading accepts."""
        return {
            "counts": [len(group) for group in self.sampled],
            "sampled": branches_to_state([branch for group in self.sampled for branch in group]),
            "unscored": self.unscored,
            "fallback": self.fallback,
            "old": None if self.old is None else _scores_to_state(self.old),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Branches:
        """What ``state_dict`` described."""
        return cls(
            sampled=_groups(branches_from_state(state["sampled"]), state["counts"]),
            unscored=list(state["unscored"]),
            fallback=[list(group) for group in state["fallback"]],
            old=None if state["old"] is None else _scores_from_state(state["old"]),
        )


def _scores_to_state(scores: Sequence[TraceScores]) -> dict[str, Any]:
    # Two tensors, however many tasks: each one takes a checkpoint as long as hundreds of numbers in a list.
    whole = TraceScores.joined(scores)
    tokens = [len(part.logprobs) for part in scores]
    return {"tokens": tokens, "logprobs": whole.logprobs, "entropies": whole.entropies}


def _scores_from_state(state: dict[str, Any]) -> list[TraceScores]:
    return TraceScores(state["logprobs"], state["entropies"]).split(state["tokens"])


def _groups(values: Sequence[V], counts: Sequence[int]) -> list[list[V]]:
    """The values cut into groups of some sizes."""
    rest = iter(values)
    return [[next(rest) for _ in range(count)] for count in counts]


@dataclass(slots=True)
class Phase:
    """The roots of one training step and what the old policy thought of them."""

    index: int
    policy_version: int
    tasks: list[Task]
    roots: list[list[Trajectory]]  # per task
    old: list[TraceScores]  # per task, of its roots
    gap: LogprobGap | None  # None: not measured before the update, which scores the roots
    refills: list[int] = field(default_factory=list)  # prompts replaced, by round
    unscored: list[int] = field(default_factory=list)  # per task, roots that could not be scored and are left out
    branches: Branches | None = None  # of all prompts, with sampled_per = "phase"

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors: what ``weights_only`` loading accepts."""
        return {
            "index": self.index,
            "policy_version": self.policy_version,
            "task_ids": [task.id for task in self.tasks],
            "counts": [len(group) for group in self.roots],
            "roots": trajectories_to_state([root for group in self.roots for root in group]),
            "old": _scores_to_state(self.old),
            "gap": None if self.gap is None else (self.gap.mean, self.gap.rms, self.gap.maximum),
            "refills": self.refills,
            "unscored": self.unscored,
            "branches": None if self.branches is None else self.branches.state_dict(),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], tasks: list[Task], refill: Refill | None = None) -> Phase:
        """The phase that ``state_dict`` described.

        Args:
            state: its state.
            tasks: the same tasks, drawn again.
            refill: as in ``PhaseRunner.begin``.

        Raises:
            DataError: the tasks are others than those of the checkpoint, or an earlier version of the package made it.
        """
        if "counts" not in state:
            raise DataError(
                "the checkpoint was made in the middle of a rollout phase by an earlier version, which wrote rollouts "
                "in another form; resume with that version, or from a checkpoint between two phases"
            )
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
            roots=_groups(trajectories_from_state(state["roots"]), state["counts"]),
            old=_scores_from_state(state["old"]),
            gap=None if state["gap"] is None else LogprobGap(*state["gap"]),
            branches=None if state.get("branches") is None else Branches.from_state_dict(state["branches"]),
        )
