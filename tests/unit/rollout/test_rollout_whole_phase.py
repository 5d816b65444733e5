"""Claims about branching a whole phase at once (``sampled_per: phase``), and about rollouts that come too late."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from appo_lightning.errors import ConfigurationError
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.phase import Phase
from appo_lightning.rollout.tree import BranchingOptions
from unit.rollout.test_rollout_phase import FakePolicy, branch_tokens, make_runner, tasks, tokens

AT_ONCE = {"sampled_per": "phase", "criterion": "entropy", "min_remaining": 1}


def test_one_wave_of_branches_serves_every_mini_batch_and_epoch():
    policy = FakePolicy()
    runner = make_runner(policy, **AT_ONCE)
    phase = runner.begin(0, tasks())
    runner.branch(phase)
    waves = len(runner.loop._sampler.requests)
    first = runner.mini_batch(phase, range(1), visit=0)
    policy.version = 1
    second, again = runner.mini_batch(phase, range(1, 3), visit=1), runner.mini_batch(phase, range(1), visit=2)
    assert len(runner.loop._sampler.requests) == waves  # nothing was sampled for a mini-batch
    assert policy.synced_at == [0, 0]
    assert [len(tree.branches) for batch in (first, second) for tree in batch.trees] == [4, 4, 4]
    assert branch_tokens(again) == branch_tokens(first)
    assert {b.trajectory.policy_version for tree in second.trees for b in tree.branches} == {0}


def test_a_prompt_gets_the_same_branches_alone_and_beside_others():
    def branches(names: list[int]) -> dict[str, list[list[int]]]:
        runner = make_runner(FakePolicy(), **AT_ONCE)
        phase = runner.begin(0, [tasks()[i] for i in names])
        runner.branch(phase)
        assert phase.branches is not None
        groups = zip(phase.tasks, phase.branches.sampled, strict=True)
        return {task.id: tokens([branch.trajectory for branch in group]) for task, group in groups}

    together = branches([0, 1, 2])
    assert {**branches([2, 0]), **branches([1])} == together


def test_trained_branches_keep_the_scores_of_the_weights_that_sampled_them():
    policy = FakePolicy()
    runner = make_runner(policy, train_branches=True, **AT_ONCE)
    phase = runner.begin(0, tasks())
    runner.branch(phase)
    policy.version = 1  # adds 0.1 to the log-prob of even ids
    batch = runner.mini_batch(phase, range(3), visit=1)
    assert batch.branch_row is not None
    even = (batch.sequences.token_ids % 2 == 0) & batch.mask
    assert even[batch.branch_row].any()
    assert torch.allclose(batch.old_logprobs, batch.behaviour_logprobs)
    assert torch.allclose(batch.current_logprobs - batch.old_logprobs, 0.1 * even)


@pytest.mark.parametrize("train_branches", [False, True])
def test_branches_survive_a_checkpoint(tmp_path: Path, train_branches: bool):
    policy = FakePolicy()
    runner = make_runner(policy, train_branches=train_branches, **AT_ONCE)
    phase = runner.begin(0, tasks())
    runner.branch(phase)
    torch.save(phase.state_dict(), tmp_path / "phase.pt")
    loaded = Phase.from_state_dict(torch.load(tmp_path / "phase.pt", weights_only=True), tasks())
    policy.version = 1
    first, second = (runner.mini_batch(each, range(1, 3), visit=1) for each in (phase, loaded))
    assert first.trees == second.trees
    for name in ("old_logprobs", "current_logprobs", "branch_score", "fallback", "mask"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rollouts": 2}, "sampled_per = 'phase' has no effect without branches"),
        ({}, r"chooses before the policy has moved: every gain of criterion = 'branching_score'.*previous"),
        ({"criterion": "future_value"}, "use gain_baseline: previous"),
    ],
)
def test_choosing_by_a_gain_that_cannot_be_there_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        BranchingOptions(**{"num_roots": 2, "num_rollouts": 6, "sampled_per": "phase", **options})


def test_a_gain_against_the_previous_policy_may_choose():
    BranchingOptions(2, 6, sampled_per="phase", gain_baseline="previous")


def test_rollouts_that_come_too_late_leave_their_groups():
    """Cities with an odd number take 5 s to look up; the engine waits 0.3 s for them."""
    limits = RolloutLimits(max_response_tokens=200, patience_s=0.3)
    runner = make_runner(FakePolicy(), limits=limits, num_roots=4, num_rollouts=4)
    runner.loop._tools["search"]._seconds = lambda argument: 5.0 * (int(argument.split()[-1]) % 2)
    phase = runner.begin(0, tasks())
    whole = make_runner(FakePolicy(), num_roots=4, num_rollouts=4).begin(0, tasks())
    for group, every, unscored in zip(phase.roots, whole.roots, phase.unscored, strict=True):
        wanted = [root for root in every if int(root.tool_calls[0].argument.split()[-1]) % 2 == 0]
        assert tokens(group) == tokens(wanted)
        assert unscored == 4 - len(wanted)
    assert 0 < runner.loop.take_statistics().late == sum(phase.unscored) < 12
    batch = runner.mini_batch(phase, range(3), visit=0)
    assert len(batch.rewards) == 12 - sum(phase.unscored)
