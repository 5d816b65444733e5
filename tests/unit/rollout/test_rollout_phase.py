"""Claims about one rollout phase: what is sampled and scored when, and that it survives a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from appo_lightning.batching import ProcedureBatch, TraceScores
from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.rewards.base import Reward, Score
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.loop import RolloutLoop
from appo_lightning.rollout.phase import Phase, Refill
from appo_lightning.rollout.runner import PhaseRunner
from appo_lightning.rollout.tree import (
    BlankTokens,
    BranchingOptions,
    overlong_penalty,
    penalise_overlong,
    rewards_of,
)
from appo_lightning.types import Task, Trajectory
from helpers.scripted import (
    EchoTool,
    LengthReward,
    ScriptedSampler,
    VariableTool,
    logprob_of,
    make_task,
    rolled_out,
    scripted_tokenizer,
)
from helpers.tiny import EOS


class FakePolicy:
    """Log-probs are the sampler's plus ``gap``; each version after ``first`` adds 0.1 where the id is even."""

    def __init__(self, first: int = 0) -> None:
        self.first = self.version = first
        self.synced_at: list[int] = []
        self.scored: list[tuple[int, int]] = []  # version, trajectories
        self.gap = 0.0

    def sync_sampler(self) -> None:
        self.synced_at.append(self.version)

    def score(self, trajectories: Sequence[Trajectory], *, temperature: float) -> TraceScores:
        assert temperature == 1.0
        self.scored.append((self.version, len(trajectories)))
        return TraceScores.joined(
            [TraceScores(self._logprobs(t, self.version), self._entropies(t)) for t in trajectories]
        )

    def score_previous(self, trajectories: Sequence[Trajectory], *, temperature: float) -> Tensor:
        return torch.cat([self._logprobs(t, self.version - 1) for t in trajectories])

    def _logprobs(self, trajectory: Trajectory, version: int) -> Tensor:
        values = [
            logprob_of(i) + self.gap + 0.1 * (version - self.first) * (i % 2 == 0) for i in trajectory.response_ids
        ]
        return torch.tensor(values) * torch.tensor(trajectory.sampled)

    def _entropies(self, trajectory: Trajectory) -> Tensor:
        return torch.tensor([0.1 + (i % 5) for i in trajectory.response_ids]) * torch.tensor(trajectory.sampled)


def script(text: str, seed: int) -> str:
    number = seed % 97
    return f"<search>city {number}</search>" if "</result>" not in text else f"<answer>{number}</answer>{EOS}"


def make_runner(
    policy: FakePolicy,
    *,
    train_branches: bool = False,
    reward: Reward | None = None,
    limits: RolloutLimits = RolloutLimits(max_response_tokens=200),  # noqa: B008
    **options: object,
) -> PhaseRunner:
    tools = [EchoTool(), VariableTool()]
    return PhaseRunner(
        loop=RolloutLoop(ScriptedSampler(script), tools, scripted_tokenizer(), limits),
        policy=policy,
        reward=reward or LengthReward(),
        options=BranchingOptions(**{"num_roots": 2, "num_rollouts": 6, **options}),  # type: ignore[arg-type]
        limits=limits,
        seed=11,
        is_blank=BlankTokens(scripted_tokenizer()),
        train_branches=train_branches,
    )


def tasks() -> list[Task]:
    return [make_task("t0"), make_task("t1"), make_task("t2")]


def tokens(trajectories: Sequence[Trajectory]) -> list[list[int]]:
    return [trajectory.response_ids for trajectory in trajectories]


def branch_tokens(batch: ProcedureBatch) -> list[list[int]]:
    return tokens([branch.trajectory for tree in batch.trees for branch in tree.branches])


def test_a_phase_begins_with_a_sync_and_scored_roots_of_every_task():
    policy = FakePolicy()
    phase = make_runner(policy).begin(4, tasks())
    assert policy.synced_at == [0]
    assert policy.scored == [(0, 6)]
    assert [len(group) for group in phase.roots] == [2, 2, 2]
    assert len({tuple(ids) for group in phase.roots for ids in tokens(group)}) == 6
    for group, scores in zip(phase.roots, phase.old, strict=True):
        for root in group:
            assert root.prompt_ids[:1] == phase.tasks[0].prompt_ids[:1]
            assert root.reward == len(root.response_text)
        sampler = [logprob for root in group for logprob in root.behaviour_logprobs]
        assert scores.logprobs.tolist() == pytest.approx(sampler)


def test_the_gap_between_sampler_and_trainer_is_measured_on_sampled_tokens():
    policy = FakePolicy()
    policy.gap = -0.25
    gap = make_runner(policy).begin(0, tasks()).gap
    assert (gap.mean, gap.rms, gap.maximum) == pytest.approx((0.25, 0.25, 0.25))


def test_before_the_policy_moves_entropy_alone_chooses_and_nothing_is_scored_again():
    policy = FakePolicy()
    runner = make_runner(policy)
    batch = runner.mini_batch(runner.begin(0, tasks()), range(2), visit=0)
    assert batch.fallback.tolist() == [True] * 4
    assert policy.scored == [(0, 6)]
    assert torch.equal(batch.current_logprobs, batch.old_logprobs)
    assert [len(tree.branches) for tree in batch.trees] == [4, 4]
    for tree in batch.trees:
        assert [branch.point.root for branch in tree.branches] == [0, 0, 1, 1]
        for branch in tree.branches:
            root, length = tree.roots[branch.point.root], branch.prefix_length
            assert branch.trajectory.response_ids[:length] == root.response_ids[:length]
            assert branch.trajectory.reward == len(branch.trajectory.response_text)


def test_after_the_policy_moved_roots_are_scored_and_the_sampler_synced_again():
    policy = FakePolicy()
    runner = make_runner(policy)
    phase = runner.begin(0, tasks())
    policy.version = 1
    batch = runner.mini_batch(phase, range(1, 3), visit=1)
    assert policy.synced_at == [0, 1]
    assert policy.scored == [(0, 6), (1, 4)]
    assert batch.fallback.tolist() == [False] * 4
    assert {branch.trajectory.policy_version for tree in batch.trees for branch in tree.branches} == {1}
    gain = (batch.current_logprobs - batch.old_logprobs)[batch.mask]
    even = batch.sequences.token_ids[batch.mask] % 2 == 0
    assert gain.tolist() == pytest.approx((0.1 * even).tolist(), abs=1e-6)


def test_the_previous_policy_makes_the_gain_informative_at_once():
    runner = make_runner(FakePolicy(first=1), gain_baseline="previous")
    batch = runner.mini_batch(runner.begin(0, tasks()), range(3), visit=0)
    assert batch.fallback.tolist() == [False] * 6


def test_without_branches_a_phase_is_plain_group_sampling():
    policy = FakePolicy()
    runner = make_runner(policy, num_rollouts=2)
    batch = runner.mini_batch(runner.begin(0, tasks()), range(3), visit=0)
    assert policy.synced_at == [0]
    assert len(batch.branch_root) == 0
    assert batch.branch_row is None
    assert batch.fallback.tolist() == [False] * 6


@pytest.mark.parametrize("visit", [0, 1])
def test_branches_to_train_on_are_left_to_the_update_to_score(visit):
    policy = FakePolicy()
    runner = make_runner(policy, train_branches=True)
    phase = runner.begin(0, tasks())
    policy.version = visit
    batch = runner.mini_batch(phase, range(2), visit=visit)
    assert policy.scored == [(0, 6), (1, 4)][: visit + 1]  # roots, no branch
    assert batch.num_scored == batch.num_roots == 4
    assert batch.branch_row is not None
    assert batch.branch_row.tolist() == list(range(4, 12))
    # Their places are held by what tells the credit that nothing has moved.
    assert torch.equal(batch.current_logprobs[4:], batch.old_logprobs[4:])


def test_rollouts_are_a_function_of_seed_phase_and_visit():
    def sample(index: int, visit: int) -> tuple[list[list[int]], list[list[int]]]:
        runner = make_runner(FakePolicy())
        phase = runner.begin(index, tasks())
        batch = runner.mini_batch(phase, range(3), visit=visit)
        return tokens([root for group in phase.roots for root in group]), branch_tokens(batch)

    assert sample(0, 0) == sample(0, 0)
    assert sample(0, 0)[0] == sample(0, 1)[0]
    assert sample(0, 0)[1] != sample(0, 1)[1]
    assert sample(0, 0)[0] != sample(1, 0)[0]


def test_what_a_prompt_gets_does_not_depend_on_its_neighbours():
    runner = make_runner(FakePolicy())
    together = runner.mini_batch(runner.begin(0, tasks()), range(3), visit=0)
    for order in ([2, 0, 1], [1]):
        chosen = [tasks()[i] for i in order]
        apart = runner.mini_batch(runner.begin(0, chosen), range(len(order)), visit=0)
        for tree, i in zip(apart.trees, order, strict=True):
            assert tokens(tree.roots) == tokens(together.trees[i].roots)
            branches = [branch.trajectory for branch in tree.branches]
            assert tokens(branches) == tokens([branch.trajectory for branch in together.trees[i].branches])


def test_a_phase_survives_a_checkpoint(tmp_path: Path):
    policy = FakePolicy()
    runner = make_runner(policy)
    phase = runner.begin(7, tasks())
    torch.save(phase.state_dict(), tmp_path / "phase.pt")
    state = torch.load(tmp_path / "phase.pt", weights_only=True)
    loaded = Phase.from_state_dict(state, tasks())
    assert (loaded.index, loaded.policy_version, loaded.gap) == (7, 0, phase.gap)
    assert loaded.roots == phase.roots
    policy.version = 1
    first, second = (runner.mini_batch(each, range(3), visit=1) for each in (phase, loaded))
    assert branch_tokens(first) == branch_tokens(second)
    assert torch.equal(first.old_logprobs, second.old_logprobs)
    assert torch.equal(first.entropies, second.entropies)


def test_a_phase_over_other_tasks_is_refused():
    phase = make_runner(FakePolicy()).begin(7, tasks())
    with pytest.raises(DataError, match=r"in the middle of a rollout phase over other tasks.*same data.train, seed"):
        Phase.from_state_dict(phase.state_dict(), tasks()[::-1])


def test_a_phase_in_the_form_of_an_earlier_version_is_refused():
    state = make_runner(FakePolicy()).begin(7, tasks()).state_dict()
    del state["counts"]
    with pytest.raises(DataError, match=r"by an earlier version.*resume with that version"):
        Phase.from_state_dict(state, tasks())


def test_seconds_are_accounted_by_what_they_went_to():
    runner = make_runner(FakePolicy())
    runner.mini_batch(runner.begin(0, tasks()), range(3), visit=0)
    assert runner.times.sample_roots > 0
    assert runner.times.sample_branches > 0


# --- dynamic sampling, budgets, long responses -----------------------------------------------------------------------


class AgreeingReward(Reward):
    """The roots of tasks named in ``equal`` all earn 1; those of others what their text says."""

    def __init__(self, *equal: str) -> None:
        self.equal = equal

    def score(self, task: Task, response_text: str) -> Score:
        if task.id in self.equal:
            return Score(1.0, True)
        return Score(float(sum(map(ord, response_text)) % 1009), True)


def refill_of(*rounds: list[str]) -> Refill:
    def refill(number: int, count: int) -> list[Task]:
        return [make_task(name) for name in rounds[number][:count]]

    return refill


def test_prompts_whose_roots_all_earn_the_same_are_replaced_until_the_rounds_are_over():
    # Round 0 replaces t0 and t2 by a and b; b is equal too, so round 1 replaces it by c, equal again: no third round.
    runner = make_runner(FakePolicy(), reward=AgreeingReward("t0", "t2", "b", "c"), max_refills=2)
    phase = runner.begin(3, tasks(), refill_of(["a", "b", "unused"], ["c"], ["never"]))
    assert [task.id for task in phase.tasks] == ["a", "t1", "c"]
    assert phase.refills == [2, 1]
    assert [len(set(rewards_of(group))) for group in phase.roots] == [2, 2, 1]
    for task, group, scores in zip(phase.tasks, phase.roots, phase.old, strict=True):
        assert all(root.prompt_ids == task.prompt_ids for root in group)
        assert len(scores.logprobs) == sum(len(root.response_ids) for root in group)
    # A prompt that came in late is sampled as if it had been there from the start.
    alone = make_runner(FakePolicy()).begin(3, [make_task("a")])
    assert tokens(alone.roots[0]) == tokens(phase.roots[0])


def test_without_other_prompts_equal_groups_stay():
    runner = make_runner(FakePolicy(), reward=AgreeingReward("t0"), max_refills=5)
    phase = runner.begin(0, tasks(), refill_of([]))
    assert [task.id for task in phase.tasks] == ["t0", "t1", "t2"]
    assert phase.refills == []


def test_refills_are_off_by_default():
    runner = make_runner(FakePolicy(), reward=AgreeingReward("t0"))
    assert runner.begin(0, tasks(), refill_of(["a"])).refills == []


def test_a_refilled_phase_survives_a_checkpoint(tmp_path: Path):
    runner = make_runner(FakePolicy(), reward=AgreeingReward("t0", "t2", "b"), max_refills=2)
    refill = refill_of(["a", "b"], ["c"])
    phase = runner.begin(7, tasks(), refill)
    torch.save(phase.state_dict(), tmp_path / "phase.pt")
    state = torch.load(tmp_path / "phase.pt", weights_only=True)
    loaded = Phase.from_state_dict(state, tasks(), refill)
    assert loaded.tasks == phase.tasks
    assert loaded.refills == [2, 1]
    first, second = (runner.mini_batch(each, range(3), visit=1) for each in (phase, loaded))
    assert branch_tokens(first) == branch_tokens(second)
    with pytest.raises(DataError, match="over other tasks"):
        Phase.from_state_dict(state, tasks(), refill_of(["x", "y"], ["z"]))
    with pytest.raises(DataError, match="over other tasks"):
        Phase.from_state_dict(state, tasks())


def test_branches_move_from_prompts_that_agree_to_those_that_do_not():
    options = {"scope": "prompt", "budget": "disagreement", "min_remaining": 1, "criterion": "random"}
    runner = make_runner(FakePolicy(), reward=AgreeingReward("t0", "t2"), num_rollouts=4, **options)
    batch = runner.mini_batch(runner.begin(0, tasks()), range(3), visit=0)
    # Two branches per prompt, six in all.
    assert [len(tree.branches) for tree in batch.trees] == [0, 6, 0]


def test_a_long_response_loses_up_to_one_point_over_the_end_of_its_budget():
    # 100 tokens, the last 40 of them cost: 60 -> 0, 70 -> -1/4, 90 -> -3/4, 100 -> -1.
    penalties = [overlong_penalty(n, max_tokens=100, buffer=40) for n in (10, 60, 70, 90, 100)]
    assert penalties == [0.0, 0.0, -0.25, -0.75, -1.0]
    root = rolled_out("abcd", reward=2.0)
    assert len(root.response_ids) == 4
    penalise_overlong([root], RolloutLimits(max_response_tokens=5, overlong="penalty", overlong_buffer=4))
    # 4 of 5 tokens with a buffer of 4: three tokens into it.
    assert root.reward == 1.25
    assert root.reward_parts["overlong"] == -0.75


def test_the_penalty_reaches_roots_and_branches():
    limits = RolloutLimits(max_response_tokens=200, overlong="penalty", overlong_buffer=200)
    runner = make_runner(FakePolicy(), reward=AgreeingReward("t0", "t1", "t2"), limits=limits)
    batch = runner.mini_batch(runner.begin(0, tasks()), range(3), visit=0)
    for tree in batch.trees:
        for trajectory in [*tree.roots, *(branch.trajectory for branch in tree.branches)]:
            assert trajectory.reward == pytest.approx(1 - len(trajectory.response_ids) / 200)


def test_cut_responses_leave_the_loss_and_stay_in_their_group():
    def cut(policy: FakePolicy, overlong: str) -> ProcedureBatch:
        limits = RolloutLimits(max_response_tokens=12, overlong=overlong)  # type: ignore[arg-type]
        runner = make_runner(policy, num_rollouts=2, limits=limits)
        return runner.mini_batch(runner.begin(0, tasks()), range(3), visit=0)

    kept, dropped = cut(FakePolicy(), "keep"), cut(FakePolicy(), "drop")
    assert {root.stop_reason for tree in kept.trees for root in tree.roots} == {"length"}
    assert kept.mask.any()
    assert not dropped.mask.any()
    assert torch.equal(kept.rewards, dropped.rewards)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BranchingOptions(2, 6, budget="disagreement"), "needs scope: prompt"),
        (lambda: BranchingOptions(2, 2, scope="prompt", budget="disagreement"), "num_rollouts > num_roots"),
        (lambda: BranchingOptions(2, 4, max_refills=-1), "max_refills must be at least 0"),
        (lambda: BranchingOptions(1, 4, max_refills=1), "one root always equals itself"),
        (lambda: RolloutLimits(overlong="penalty"), "a penalty needs a buffer"),
        (lambda: RolloutLimits(overlong_buffer=3), "a penalty needs a buffer"),
        (lambda: RolloutLimits(max_response_tokens=5, overlong="penalty", overlong_buffer=6), r"in \[0, max_response"),
    ],
)
def test_options_that_contradict_each_other_are_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


# --- rollouts that cannot be scored ----------------------------------------------------------------------------------


class SilentJudge(LengthReward):
    """Has no answer for some numbers."""

    def __init__(self, *silent_about: int) -> None:
        self.marks = [f"<answer>{number}</answer>" for number in silent_about]

    def score(self, task: Task, response_text: str) -> Score:
        if not self.marks or any(mark in response_text for mark in self.marks):
            return Score(value=None, success=False)
        return super().score(task, response_text)


def answer_of(trajectory: Trajectory) -> int:
    return int(trajectory.response_text.split("<answer>")[1].split("<")[0])


def test_a_rollout_without_a_value_leaves_its_group_and_nothing_else():
    whole = make_runner(FakePolicy()).begin(0, tasks())
    silent = answer_of(whole.roots[1][0])
    policy = FakePolicy()
    runner = make_runner(policy, reward=SilentJudge(silent))
    phase = runner.begin(0, tasks())
    assert phase.unscored == [0, 1, 0]
    assert [tokens(group) for group in phase.roots] == [
        tokens(whole.roots[0]),
        tokens(whole.roots[1][1:]),
        tokens(whole.roots[2]),
    ]
    assert policy.scored == [(0, 5)]  # what is not trained on is not scored by the policy either
    assert [len(scores.logprobs) for scores in phase.old] == [
        sum(len(root.response_ids) for root in group) for group in phase.roots
    ]
    batch = runner.mini_batch(phase, range(3), visit=0)
    assert batch.prompt_index.tolist() == [0, 0, 1, 2, 2]
    assert [tree.unscored for tree in batch.trees] == [0, 1, 0]
    assert [len(tree.branches) for tree in batch.trees] == [4, 2, 4]  # of each root as many as ever


def test_a_branch_without_a_value_is_no_branch():
    full = make_runner(FakePolicy())
    branches = full.mini_batch(full.begin(0, tasks()), range(1), visit=0).trees[0].branches
    roots = {answer_of(root) for root in full.begin(0, tasks()).roots[0]}
    silent = next(n for n in map(answer_of, (branch.trajectory for branch in branches)) if n not in roots)
    runner = make_runner(FakePolicy(), reward=SilentJudge(silent))
    batch = runner.mini_batch(runner.begin(0, tasks()), range(1), visit=0)
    kept = [
        ids
        for ids, branch in zip(tokens([b.trajectory for b in branches]), branches, strict=True)
        if answer_of(branch.trajectory) != silent
    ]
    assert branch_tokens(batch) == kept
    assert batch.trees[0].unscored == 4 - len(kept) > 0
    assert len(batch.branch_reward) == len(batch.branch_root) == len(kept)


def test_a_phase_with_small_groups_survives_a_checkpoint():
    silent = answer_of(make_runner(FakePolicy()).begin(0, tasks()).roots[0][1])
    phase = make_runner(FakePolicy(), reward=SilentJudge(silent)).begin(0, tasks())
    again = Phase.from_state_dict(phase.state_dict(), tasks())
    assert again.unscored == phase.unscored == [1, 0, 0]
    assert [tokens(group) for group in again.roots] == [tokens(group) for group in phase.roots]


def test_a_prompt_without_any_value_is_replaced_like_one_whose_roots_agree():
    whole = make_runner(FakePolicy()).begin(0, tasks())
    judge = SilentJudge(*map(answer_of, whole.roots[1]))
    runner = make_runner(FakePolicy(), reward=judge, max_refills=1)
    phase = runner.begin(0, tasks(), refill=lambda number, count: [make_task("t9")][:count])
    assert "t9" in [task.id for task in phase.tasks]
    runner = make_runner(FakePolicy(), reward=judge)
    batch = runner.mini_batch(runner.begin(0, tasks()), range(3), visit=0)
    assert batch.prompt_index.tolist() == [0, 0, 2, 2]  # without refills it contributes nothing


def test_a_mini_batch_without_any_value_stops_the_run():
    runner = make_runner(FakePolicy(), reward=SilentJudge())
    with pytest.raises(DataError, match=r"none of the 4 rollouts.* could be scored: SilentJudge gave no value"):
        runner.mini_batch(runner.begin(0, tasks()), range(2), visit=0)
