"""Rollouts that the weights of the coming update sampled are scored by that update: no forward pass of their own."""

import dataclasses

import numpy as np
import pytest

from appo_lightning.rollout.runner import PhaseRunner
from appo_lightning.rollout.tree import BranchingOptions
from appo_lightning.sources import RolloutSource
from helpers.training import Result, Run, fit, make_checkpoint

METRICS = ("policy/entropy", "loss/policy", "loss/approx_kl", "credit/likelihood_gain_abs", "credit/influence")


def assert_same_weights(first: Result, second: Result) -> None:
    for name, weight in second.weights.items():
        np.testing.assert_allclose(first.weights[name], weight, rtol=0, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("policy"))
    return Run(checkpoint, branching=BranchingOptions(4, 4), prompts_per_phase=4, prompts_per_mini_batch=4, max_steps=3)


@pytest.fixture(scope="module")
def alone(run):
    return fit(run)


@pytest.fixture(scope="module")
def beside(run):
    """The same with a forward of its own for the scores."""
    make_runner = RolloutSource._make_runner
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            RolloutSource, "_make_runner", lambda source: dataclasses.replace(make_runner(source), update_scores=False)
        )
        return fit(run)


def test_no_forward_of_its_own_is_made(alone, beside):
    assert max(alone.series("time/score")) == 0.0
    assert min(beside.series("time/score")) > 0.0


def test_it_learns_the_same(alone, beside):
    assert alone.global_step == beside.global_step == 3
    assert_same_weights(alone, beside)


@pytest.mark.parametrize("name", METRICS)
def test_it_tells_the_same(name, alone, beside):
    assert alone.series(name) == pytest.approx(beside.series(name), rel=1e-3, abs=1e-6)


def test_the_gap_to_the_sampler_is_still_measured(alone, beside):
    for name in ("sync/logprob_gap_mean", "sync/logprob_gap_rms", "sync/logprob_gap_max"):
        assert all(0 < gap < 1e-4 for gap in alone.series(name))
        assert len(alone.series(name)) == len(beside.series(name)) == 3


@pytest.mark.parametrize(
    "change", [{"prompts_per_mini_batch": 2}, {"epochs_per_phase": 2}, {"branching": BranchingOptions(2, 4)}]
)
def test_elsewhere_rollouts_are_scored_first(change, run):
    result = fit(dataclasses.replace(run, max_steps=1, **change))
    assert result.series("time/score")[0] > 0.0


# --- branches that are trained on ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[False, True], ids=["padded", "packed"])
def branched(run, request) -> Run:
    return dataclasses.replace(
        run,
        branching=BranchingOptions(2, 4),
        prompts_per_mini_batch=2,
        max_steps=4,
        train_branches=True,
        shared_prefixes=request.param,
    )


@pytest.fixture(scope="module")
def branches_alone(branched):
    return fit(branched)


@pytest.fixture(scope="module")
def branches_beside(branched):
    """The same with a forward of its own for the scores of the branches."""
    branch = PhaseRunner._branch

    def scored(runner, *args):
        branches = branch(runner, *args)
        branches.old = runner._score_branches(branches)
        return branches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PhaseRunner, "_branch", scored)
        return fit(branched)


def test_trained_branches_teach_the_same(branches_alone, branches_beside):
    assert branches_alone.global_step == branches_beside.global_step == 4
    assert_same_weights(branches_alone, branches_beside)


@pytest.mark.parametrize("name", METRICS)
def test_trained_branches_tell_the_same(name, branches_alone, branches_beside):
    assert branches_alone.series(name) == pytest.approx(branches_beside.series(name), rel=1e-3, abs=1e-6)
