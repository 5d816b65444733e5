"""A run that was killed and continues is the run that was never killed: equal numbers, not close ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from appo_lightning.callbacks import AtomicCheckpointIO, GracefulStop
from appo_lightning.errors import AppoError, ConfigurationError, SamplerError
from appo_lightning.module import LossOptions
from appo_lightning.policy.options import OptimizerOptions
from appo_lightning.rollout.tree import BranchingOptions
from appo_lightning.samplers.base import Completion
from appo_lightning.samplers.transformers import TransformersSampler
from helpers.ranks import kill_oneself, run_until_killed
from helpers.training import Result, Run, fit, make_checkpoint

PREVIOUS = BranchingOptions(2, 4, gain_baseline="previous")
# Letters are counted coarsely then, so that some roots earn the same.
REFILLED = BranchingOptions(2, 4, scope="prompt", budget="disagreement", max_refills=2)
# Told by the clock; and the canary, which asks a new engine more than one that it has asked before.
OF_THIS_PROCESS = ("seconds", "time/", "wait_share", "canary_gap")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("policy"), hidden_size=32, num_layers=1)


@pytest.fixture(scope="module")
def uninterrupted(checkpoint: str) -> Callable[[Run], Result]:
    """The same run without a break; each is made once."""
    made: dict[str, Result] = {}

    def make(run: Run) -> Result:
        key = repr(run)
        if key not in made:
            made[key] = fit(run)
        return made[key]

    return make


class KilledSampler(TransformersSampler):
    """Dies while it samples after so many optimiser steps, as under the out-of-memory killer."""

    def __init__(self, after_steps: int) -> None:
        super().__init__()
        self.after_steps, self.pushes = after_steps, 0

    def load_weights(self, weights: Any) -> None:
        super().load_weights(weights)
        self.pushes += 1  # one push before every step: there are branches

    def step(self) -> list[Completion]:
        completions = super().step()
        if self.pushes > self.after_steps and len(completions) > 2:  # not in the canary
            kill_oneself()
        return completions


def fit_and_die(run: Run, after_steps: int) -> None:
    fit(run, sampler=KilledSampler(after_steps))


def assert_equal_runs(resumed: Result, whole: Result, *, from_step: int) -> None:
    """Rollouts, metrics and weights are equal to the last bit from ``from_step`` on."""
    assert sorted(resumed.rollouts) == [step for step in sorted(whole.rollouts) if step >= from_step]
    for step, rollouts in resumed.rollouts.items():
        assert rollouts == whole.rollouts[step], f"rollouts of step {step}"
    for step, metrics in resumed.metrics.items():
        expected = {n: v for n, v in whole.metrics[step].items() if not any(word in n for word in OF_THIS_PROCESS)}
        got = {n: v for n, v in metrics.items() if not any(word in n for word in OF_THIS_PROCESS)}
        assert got == expected, f"metrics of step {step}"
    for name, weight in whole.weights.items():
        assert (resumed.weights[name] == weight).all(), name
    assert resumed.global_step == whole.global_step


TWO_EPOCHS = Run(
    "",
    max_steps=-1,
    trainer={"max_epochs": 2},
    optimizer=OptimizerOptions(learning_rate=3e-3, schedule="linear"),
)
CASES = {
    # Phases of two mini-batches; an epoch has two phases.
    "full, inside a phase": (Run(""), 1),
    "full, between phases": (Run(""), 2),
    "full, between epochs": (Run("", max_steps=6), 4),
    "lora, inside a phase": (Run("", lora=True), 3),
    "lora, between phases": (Run("", lora=True), 2),
    "two passes, inside the first": (Run("", epochs_per_phase=2, max_steps=6), 1),
    "two passes, inside the second": (Run("", epochs_per_phase=2, max_steps=6), 3),
    "previous, full, inside a phase": (Run("", branching=PREVIOUS, max_steps=6), 3),
    "previous, lora, between phases": (Run("", branching=PREVIOUS, lora=True, max_steps=6), 4),
    "everything": (
        Run(
            "",
            branching=PREVIOUS,
            lora=True,
            max_steps=7,
            epochs_per_phase=2,
            train_branches=True,
            loss=LossOptions(kl="k3", kl_coefficient=0.1, importance_cap=1.0),
            optimizer=OptimizerOptions(learning_rate=3e-3, warmup_steps=2, schedule="cosine"),
        ),
        5,
    ),
    "refilled, inside a phase": (Run("", branching=REFILLED), 1),
    "refilled, between phases": (Run("", branching=REFILLED), 2),
    "a schedule that ends with the epochs": (TWO_EPOCHS, 5),
    "epochs, between them": (TWO_EPOCHS, 4),
}


def test_a_gain_against_the_previous_policy_cannot_begin_inside_a_phase(checkpoint, tmp_path: Path) -> None:
    fit(Run(checkpoint, max_steps=1, output=str(tmp_path)))
    with pytest.raises(ConfigurationError, match="resume with 'behaviour'"):
        fit(Run(checkpoint, branching=PREVIOUS, resume=str(tmp_path / "last.ckpt")))


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_continues_exactly(checkpoint, uninterrupted, tmp_path: Path, case) -> None:
    run, steps = CASES[case]
    run.checkpoint = checkpoint
    whole = uninterrupted(run)
    broken = Run(**{**vars(run), "output": str(tmp_path)})
    run_until_killed(fit_and_die, broken, steps)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["global_step"] == steps
    if run.lora:
        assert all(".lora_" in name for name in state["state_dict"])

    broken.resume = str(tmp_path / "last.ckpt")
    resumed = fit(broken)
    assert_equal_runs(resumed, whole, from_step=steps)
    if run.branching.max_refills:
        assert max(whole.series("rollout/refilled_prompts")) > 0
    # The losses are numbers that could differ.
    assert len(set(whole.series("loss/policy"))) > 2


@pytest.mark.parametrize("train_branches", [False, True])
def test_branches_of_a_whole_phase_continue_exactly(checkpoint, uninterrupted, tmp_path: Path, train_branches) -> None:
    at_once = BranchingOptions(2, 4, gain_baseline="previous", sampled_per="phase")
    run = Run(checkpoint, branching=at_once, train_branches=train_branches, max_steps=6, epochs_per_phase=2)
    # A phase has four steps: the first is over, the second has one step behind it.
    fit(Run(**{**vars(run), "output": str(tmp_path), "max_steps": 5}))
    resumed = fit(Run(**{**vars(run), "resume": str(tmp_path / "last.ckpt")}))
    assert_equal_runs(resumed, uninterrupted(run), from_step=5)


def test_a_run_resumed_twice_is_still_the_same(checkpoint, uninterrupted, tmp_path: Path) -> None:
    run = Run(checkpoint, epochs_per_phase=2, max_steps=6)
    broken = Run(**{**vars(run), "output": str(tmp_path)})
    last = str(tmp_path / "last.ckpt")
    for steps, resume in ((1, None), (3, last), (6, last)):
        broken.max_steps, broken.resume = steps, resume
        result = fit(broken)
        assert result.global_step == steps
    assert_equal_runs(result, uninterrupted(run), from_step=3)


def test_a_finished_run_has_nothing_left_to_do(checkpoint, tmp_path: Path) -> None:
    run = Run(checkpoint, str(tmp_path), max_steps=2)
    whole = fit(run)
    run.resume = str(tmp_path / "last.ckpt")
    again = fit(run)
    assert not again.rollouts
    assert again.global_step == 2
    assert all((again.weights[name] == weight).all() for name, weight in whole.weights.items())


class SignalAt(L.Callback):
    """Sends a signal to its own process at the start of a step."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_after_the_mini_batch_with_a_checkpoint(
    checkpoint, uninterrupted, tmp_path: Path, number
) -> None:
    handlers = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGUSR1)}
    run = Run(checkpoint, max_steps=4)
    stop = GracefulStop()
    module, data = run.module(), run.data()
    # The usual checkpoint is far away: the one of the stop counts.
    trainer = run.make_trainer([SignalAt(0, number), stop], default_root_dir=tmp_path)
    trainer.fit(module, datamodule=data)
    assert stop.received == number
    assert trainer.global_step == 1
    assert {which: signal.getsignal(which) for which in handlers} == handlers
    data.close()

    run.resume = str(tmp_path / "last.ckpt")
    assert_equal_runs(fit(run), uninterrupted(Run(checkpoint, max_steps=4)), from_step=1)


class BreakingSampler(TransformersSampler):
    """Breaks ``times`` times while it samples after so many optimiser steps."""

    def __init__(self, after_steps: int, times: int) -> None:
        super().__init__()
        self.after_steps, self.times, self.pushes = after_steps, times, 0

    def load_weights(self, weights: Any) -> None:
        super().load_weights(weights)
        self.pushes += 1

    def step(self) -> list[Completion]:
        completions = super().step()
        if self.pushes > self.after_steps and self.times and len(completions) > 2:  # not in the canary
            self.times -= 1
            raise RuntimeError("out of memory")
        return completions


@pytest.mark.filterwarnings("ignore:BreakingSampler failed to step")
@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_whose_engine_breaks_goes_on_as_if_it_had_not(checkpoint, uninterrupted, steps) -> None:
    sampler = BreakingSampler(steps, times=2)
    run = Run(checkpoint, max_steps=4)
    assert_equal_runs(fit(run, sampler=sampler), uninterrupted(run), from_step=0)
    assert sampler.times == 0


@pytest.mark.filterwarnings("ignore:BreakingSampler failed to step")
@pytest.mark.parametrize("steps", [1, 2])
def test_an_engine_that_breaks_for_good_leaves_a_checkpoint(checkpoint, uninterrupted, tmp_path: Path, steps) -> None:
    run = Run(checkpoint, max_steps=4)
    trainer = run.make_trainer([GracefulStop()], default_root_dir=tmp_path)
    data = run.data(BreakingSampler(steps, times=99))
    with pytest.raises(SamplerError, match="BreakingSampler failed to step: RuntimeError: out of memory"):
        trainer.fit(run.module(), datamodule=data)
    data.close()
    run.resume = str(tmp_path / "last.ckpt")
    assert_equal_runs(fit(run), uninterrupted(Run(checkpoint, max_steps=4)), from_step=steps)


def test_the_checkpoint_of_a_stop_lies_where_resume_looks_for_it(checkpoint, tmp_path: Path) -> None:
    run = Run(checkpoint, str(tmp_path / "checkpoints"), max_steps=4)
    trainer = run.make_trainer([SignalAt(0, signal.SIGTERM), GracefulStop()])
    trainer.checkpoint_callback._every_n_train_steps = 100  # type: ignore[union-attr]
    trainer.fit(run.module(), datamodule=run.data())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_torn_file_is_swept_and_a_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    target, torn = tmp_path / "last.ckpt", tmp_path / ".epoch=0-step=7.ckpt.4711.tmp"
    torn.write_bytes(b"half a check")
    keep = tmp_path / ".hidden"
    keep.write_text("not ours")
    io = AtomicCheckpointIO()
    io.save_checkpoint({"number": torch.tensor(1)}, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "last.ckpt"]

    class Unpicklable:
        def __reduce__(self) -> Any:
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        io.save_checkpoint({"number": torch.tensor(2), "bad": Unpicklable()}, target)
    assert io.load_checkpoint(target)["number"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "last.ckpt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": True}, r"does not fit this policy: \d+ trained weights missing"),
        ({"seed": 1}, "in the middle of a rollout phase over other tasks"),
        ({"train_size": 24}, "epochs have 2 phases of 2 mini-batches, those of this run 3 phases of 2"),
        ({"prompts_per_mini_batch": 2}, "epochs have 2 phases of 2 mini-batches, those of this run 2 phases of 4"),
        ({"branching": BranchingOptions(4, 8)}, "a rollout phase of 2 roots per prompt.*resume with 2"),
    ],
    ids=["lora", "seed", "train_size", "prompts_per_mini_batch", "num_roots"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(checkpoint, tmp_path: Path, changes, message) -> None:
    fit(Run(checkpoint, str(tmp_path), max_steps=1))
    run = Run(checkpoint, str(tmp_path), resume=str(tmp_path / "last.ckpt"), **changes)
    with pytest.raises(AppoError, match=message) as raised:
        fit(run)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("refills", [0, 1])
def test_a_phase_with_refills_goes_on_under_the_number_that_it_was_made_with(checkpoint, tmp_path, refills) -> None:
    fit(Run(checkpoint, str(tmp_path), max_steps=1, branching=REFILLED))
    changed = Run(checkpoint, branching=replace(REFILLED, max_refills=refills), resume=str(tmp_path / "last.ckpt"))
    said = rf"replaced [1-9]\d* prompts with data.branching.max_refills = 2, this run has {refills}; resume with 2"
    with pytest.raises(ConfigurationError, match=said):
        fit(changed)


def test_adapters_are_no_whole_policy(checkpoint, tmp_path: Path) -> None:
    fit(Run(checkpoint, str(tmp_path), max_steps=1, lora=True))
    with pytest.raises(
        ConfigurationError, match=r"does not fit this policy: \d+ trained weights missing.*, [1-9]\d* unknown"
    ):
        fit(Run(checkpoint, str(tmp_path), resume=str(tmp_path / "last.ckpt")))
