"""Batches for Lightning: mini-batches of rollout phases to train on, and rollouts of held-out questions."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from appo_lightning.agreement import Agreement
from appo_lightning.batching import EvaluationBatch, ProcedureBatch, TraceScores
from appo_lightning.errors import ConfigurationError
from appo_lightning.metrics import of_all_ranks
from appo_lightning.rollout.episode import Prefix
from appo_lightning.rollout.phase import LogprobGap, Phase, Refill
from appo_lightning.rollout.runner import PhaseRunner
from appo_lightning.rollout.seeds import derive_seed
from appo_lightning.rollout.tree import BlankTokens, score_rewards
from appo_lightning.types import RolloutTree, Task, Trajectory

if TYPE_CHECKING:
    from appo_lightning.datamodule import RolloutDataModule


class _TrainerPolicy:
    """The data module as a ``PhasePolicy``."""

    def __init__(self, data: RolloutDataModule, ranks: Agreement) -> None:
        self._data, self._ranks = data, ranks

    @property
    def version(self) -> int:
        return self._data.module.weights_version

    def sync_sampler(self) -> None:
        self._data.start_sampler()
        with self._ranks.collective():
            self._data.sync_sampler()

    def score(self, trajectories: Sequence[Trajectory], *, temperature: float) -> TraceScores:
        with self._ranks.collective():
            return self._data.module.score(trajectories, temperature=temperature)

    def score_previous(self, trajectories: Sequence[Trajectory], *, temperature: float) -> Tensor:
        with self._ranks.collective():
            return self._data.module.score_previous(trajectories, temperature=temperature)


class RolloutSource:
    """Training batches for Lightning: sized, so that batch k+1 is drawn after step k; stateful, so that a resumed run
    continues exactly, in the middle of a phase too.
    """

    def __init__(self, data: RolloutDataModule) -> None:
        self._data = data
        trainer = data.trainer
        assert trainer is not None
        self._rank, self._world_size = trainer.global_rank, trainer.world_size
        self._ranks = Agreement(self._world_size)
        self._phases_per_epoch = len(data.train) // data.prompts_per_phase
        self._visits_per_phase = data.epochs_per_phase * data.prompts_per_phase // data.prompts_per_mini_batch
        self.epoch = 0
        self.position = 0  # mini-batches drawn in this epoch
        self.phase: Phase | None = None
        self.runner: PhaseRunner | None = None
        self._stored_phase: dict[str, Any] | None = None
        self._order_of: tuple[int, list[int]] | None = None  # an epoch, and the order of its tasks

    def __len__(self) -> int:
        return self._phases_per_epoch * self._visits_per_phase

    def __iter__(self) -> Iterator[ProcedureBatch]:
        while self.position < len(self):
            with self._ranks.work(), self._data.module.evaluating():
                batch = self._draw()
                self._data.sampler.sleep()
            # Before the yield: checkpoints are taken while this is suspended, and nothing runs after the last one.
            self.position += 1
            if self.position == len(self):
                self.epoch, self.position = self.epoch + 1, 0
                yield batch
                return
            yield batch

    def _draw(self) -> ProcedureBatch:
        if self.runner is None:
            self.runner = self._make_runner()
        phase_in_epoch, visit = divmod(self.position, self._visits_per_phase)
        index = self.epoch * self._phases_per_epoch + phase_in_epoch
        if self.phase is None or self.phase.index != index:
            self.phase = self._begin_phase(index, phase_in_epoch)
        own = self._data.prompts_per_phase // self._world_size
        size = self._data.prompts_per_mini_batch // self._world_size
        first = visit * size % own
        return self.runner.mini_batch(self.phase, range(first, first + size), visit=visit)

    def _begin_phase(self, index: int, phase_in_epoch: int) -> Phase:
        assert self.runner is not None
        tasks = self._tasks(phase_in_epoch)
        stored, self._stored_phase = self._stored_phase, None
        if stored is not None:
            assert stored["index"] == index
            phase = Phase.from_state_dict(stored, tasks, self._refill(phase_in_epoch))
            found, wanted = len(phase.roots[0]) + phase.unscored[0], self._data.branching.num_roots
            if found != wanted:
                raise ConfigurationError(
                    f"the checkpoint lies inside a rollout phase of {found} roots per prompt, this run has "
                    f"data.branching.num_roots = {wanted}; resume with {found}"
                )
            return phase
        phase = self.runner.begin(index, tasks, self._refill(phase_in_epoch))
        if phase.gap is not None:
            # The noise floor decides where to branch: the same on every rank, measured on all tokens.
            tokens = sum(root.num_sampled for group in phase.roots for root in group)
            with self._ranks.collective():
                phase.gap = self._checked_gap(phase.gap, tokens)
        self._data.module.on_phase_begin()
        if self._data.branching.sampled_per == "phase":
            self.runner.branch(phase)
        return phase

    def measure_gap(self, batch: ProcedureBatch) -> LogprobGap:
        """How far sampler and trainer were apart on the roots of the phase. Collective, and once per phase.

        Args:
            batch: of the phase, after its update.

        Raises:
            WeightSyncError: further than numerics explain.
        """
        assert self.phase is not None
        if self.phase.gap is None:
            differences = (batch.old_logprobs - batch.behaviour_logprobs)[batch.mask]
            self.phase.gap = self._checked_gap(LogprobGap.of(differences.cpu()), differences.numel())
        return self.phase.gap

    def _checked_gap(self, gap: LogprobGap, tokens: int) -> LogprobGap:
        """The gap on the tokens of all ranks, from that on this rank's."""
        gap = _gap_of_all_ranks(gap, tokens)
        if self._data.check_gap is not None and self._data.sampler.provides_logprobs:
            self._data.check_gap(gap)
        return gap

    def _tasks(self, phase_in_epoch: int) -> list[Task]:
        """This rank's tasks of a phase; all ranks shuffle alike."""
        data = self._data
        start = phase_in_epoch * data.prompts_per_phase
        chosen = self._order()[start : start + data.prompts_per_phase][self._rank :: self._world_size]
        return data.tasks(data.train, chosen)

    def _order(self) -> list[int]:
        """Of the tasks of this epoch. Kept: shuffling a large set takes longer than the rest of a mini-batch's plan."""
        if self._order_of is None or self._order_of[0] != self.epoch:
            order = list(range(len(self._data.train)))
            random.Random(derive_seed(self._data.seed, "order", self.epoch)).shuffle(order)
            self._order_of = self.epoch, order
        return self._order_of[1]

    def _refill(self, phase_in_epoch: int) -> Refill | None:
        """Tasks of other phases in an order of this phase's own; every rank has its part, no task comes twice."""
        data, size = self._data, self._data.prompts_per_phase
        if not data.branching.max_refills:
            return None
        order = self._order()
        spare = order[: phase_in_epoch * size] + order[(phase_in_epoch + 1) * size :]
        random.Random(derive_seed(data.seed, "refill", self.epoch, phase_in_epoch)).shuffle(spare)
        rounds = data.branching.max_refills
        own = spare[self._rank :: self._world_size]

        def refill(number: int, count: int) -> list[Task]:
            # Each round has a stretch of its own, so that what it gives depends on nothing but its number.
            stretch = own[number * len(own) // rounds : (number + 1) * len(own) // rounds]
            return data.tasks(data.train, stretch[:count])

        return refill

    def _make_runner(self) -> PhaseRunner:
        data = self._data
        return PhaseRunner(
            loop=data.loop(data.rollout),
            policy=_TrainerPolicy(data, self._ranks),
            reward=data.reward,
            options=data.branching,
            limits=data.rollout,
            seed=data.seed,
            is_blank=BlankTokens(data.module.policy.tokenizer),
            train_branches=data.train_branches,
            update_scores=not data.branching.num_branches and self._visits_per_phase == 1,
            progress=data.report,
        )

    def state_dict(self) -> dict[str, Any]:
        """Position, and the roots of a phase that is not finished. Collective: rank 0's file holds all ranks' roots."""
        between_phases = self.position % self._visits_per_phase == 0
        own = None if self.phase is None or between_phases else self.phase.state_dict()
        return {
            "epoch": self.epoch,
            "position": self.position,
            "size": self._size(),
            "max_refills": self._data.branching.max_refills,
            "phases": of_all_ranks(own),
        }

    def _size(self) -> tuple[int, int]:
        return self._phases_per_epoch, self._visits_per_phase

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        Raises:
            ConfigurationError: with phases or epochs of another size; inside a phase, with another number of processes,
                or other refills.
        """
        if tuple(state["size"]) != self._size():
            then, now = (
                f"{phases} phases of {visits} mini-batches" for phases, visits in (state["size"], self._size())
            )
            raise ConfigurationError(
                f"the checkpoint's epochs have {then}, those of this run {now}; resume with the same data.train, "
                "prompts_per_phase, prompts_per_mini_batch and epochs_per_phase"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        phases = state["phases"]
        if any(phase is not None for phase in phases):
            if len(phases) != self._world_size:
                raise ConfigurationError(
                    f"the checkpoint lies inside a rollout phase of {len(phases)} processes, this run has "
                    f"{self._world_size}; resume with {len(phases)}"
                )
            self._check_refills(state.get("max_refills"), sum(sum(phase["refills"]) for phase in phases))
            self._stored_phase = phases[self._rank]

    def _check_refills(self, then: int | None, replaced: int) -> None:
        # Which prompts replace others depends on how often they may.
        now = self._data.branching.max_refills
        if replaced and then is not None and then != now:  # None: a checkpoint that does not tell
            raise ConfigurationError(
                f"the checkpoint lies inside a rollout phase that replaced {replaced} prompts with "
                f"data.branching.max_refills = {then}, this run has {now}; resume with {then}"
            )


def _gap_of_all_ranks(gap: LogprobGap, tokens: int) -> LogprobGap:
    parts = of_all_ranks((tokens, gap.mean, gap.rms, gap.maximum))
    total = max(1, sum(part[0] for part in parts))
    return LogprobGap(
        mean=sum(count * mean for count, mean, _, _ in parts) / total,
        rms=math.sqrt(sum(count * rms**2 for count, _, rms, _ in parts) / total),
        maximum=max(maximum for _, _, _, maximum in parts),
    )


class EvaluationSource:
    """All validation questions as one batch of trees per process."""

    def __init__(self, data: RolloutDataModule) -> None:
        self._data = data

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[EvaluationBatch]:
        data = self._data
        trainer = data.trainer
        assert trainer is not None
        ranks = Agreement(trainer.world_size)
        with ranks.work():
            data.start_sampler()
            with ranks.collective():
                data.sync_sampler()
            loop = data.loop(data.validation_limits)
            chosen = range(trainer.global_rank, len(data.validation), trainer.world_size)
            tasks = data.tasks(data.validation, chosen)
            count = data.validation_rollouts
            prefixes = [
                Prefix(task, derive_seed(data.seed, "validation", task.id, n)) for task in tasks for n in range(count)
            ]
            trajectories = loop.run(
                prefixes,
                policy_version=data.module.weights_version,
                progress=lambda done, total: data.report("validation", done, total),
            )
            trees = []
            for i, task in enumerate(tasks):
                roots = trajectories[i * count : (i + 1) * count]
                score_rewards(data.reward, task, roots)
                trees.append(RolloutTree(task, roots))
            data.sampler.sleep()
        yield EvaluationBatch(trees, loop.statistics.seconds)
