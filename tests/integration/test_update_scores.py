"""Where a phase has one update and no branches, nothing but the update itself scores the rollouts."""

import dataclasses

import numpy as np
import pytest

from appo_lightning.rollout.tree import BranchingOptions
from appo_lightning.sources import RolloutSource
from helpers.training import Run, fit, make_checkpoint

METRICS = ("policy/entropy", "loss/policy", "loss/approx_kl", "credit/likelihood_gain_abs")


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
    for name, weight in beside.weights.items():
        np.testing.assert_allclose(alone.weights[name], weight, rtol=0, atol=1e-5, err_msg=name)


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
