"""An engine that breaks on one process of several: it is replaced, or all processes stop together with a checkpoint."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from appo_lightning.callbacks import GracefulStop
from appo_lightning.errors import AppoError
from appo_lightning.rewards.base import Reward, Score
from appo_lightning.samplers.base import Completion, Sampler, SampleRequest
from appo_lightning.samplers.transformers import TransformersSampler
from appo_lightning.types import Task
from helpers.ranks import run_ranks
from helpers.training import Result, Run, fit, make_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:.*takes over")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(tmp_path_factory.mktemp("policy"), hidden_size=32, num_layers=1)


class Breaking(TransformersSampler):
    """On rank 1, breaks a number of times after a number of pushes."""

    def __init__(self, after_pushes: int, times: int) -> None:
        super().__init__()
        self.after_pushes, self.times, self.pushes, self.starts = after_pushes, times, 0, 0

    def start(self, *args: Any, **options: Any) -> None:
        super().start(*args, **options)
        self.starts += 1

    def load_weights(self, weights: Any) -> None:
        super().load_weights(weights)
        self.pushes += 1

    def submit(self, request: SampleRequest) -> None:
        super().submit(request)
        self.in_canary = request.max_tokens == 1

    def step(self) -> list[Completion]:
        completions = super().step()
        due = self.times > 0 and self.pushes > self.after_pushes and not self.in_canary
        if os.environ["LOCAL_RANK"] == "1" and due:
            self.times -= 1
            raise RuntimeError("out of memory")
        return completions


def fit_and_tell(run: Run, sampler: Sampler | None = None) -> tuple[str, Result | None]:
    """What stopped the run, if anything."""
    try:
        return "", fit(run, [GracefulStop()], sampler)
    except (AppoError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}", None


def fit_with_an_engine_that_breaks(run: Run, after_pushes: int, times: int) -> tuple[str, Result | None, int]:
    sampler = Breaking(after_pushes, times)
    return *fit_and_tell(run, sampler), sampler.starts


# Push 0 samples the roots of the first phase, 1 branches of its second mini-batch, 2 the roots of the second phase.
@pytest.mark.parametrize(("strategy", "after_pushes"), [("ddp", 2), ("fsdp2", 1)])
def test_all_ranks_stop_where_one_has_failed_for_good(checkpoint, tmp_path: Path, strategy, after_pushes) -> None:
    run = Run(checkpoint, str(tmp_path), strategy=strategy, max_steps=4)
    told = run_ranks(fit_with_an_engine_that_breaks, run, after_pushes, 99)
    for error, _, _ in told:
        assert error.endswith("rank 1: Breaking failed to step: RuntimeError: out of memory"), error
    # Weights of every rank are needed to fill an engine where they are sharded.
    assert [starts for _, _, starts in told] == [1, 1 if strategy == "fsdp2" else 3]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == after_pushes
    # And it can be continued.
    whole, resumed = (
        run_ranks(fit, Run(checkpoint, strategy=strategy, max_steps=4, resume=resume))
        for resume in (None, str(tmp_path / "last.ckpt"))
    )
    assert {step: resumed[1].rollouts[step] for step in (after_pushes, 3)} == {
        step: whole[1].rollouts[step] for step in (after_pushes, 3)
    }


def test_where_every_rank_has_all_weights_one_alone_replaces_its_engine(checkpoint) -> None:
    run = Run(checkpoint, strategy="ddp", max_steps=4)
    told = run_ranks(fit_with_an_engine_that_breaks, run, 1, 2)
    assert [starts for _, _, starts in told] == [1, 3]
    for rank, whole in enumerate(run_ranks(fit, run)):
        error, result, _ = told[rank]
        assert result is not None, error
        assert result.rollouts == whole.rollouts
        assert all((result.weights[name] == weight).all() for name, weight in whole.weights.items())


class Choking(TransformersSampler):
    """On rank 1, breaks in the middle of the second push, in the third canary, or as it falls asleep."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.pushes = where if os.environ["LOCAL_RANK"] == "1" else "nowhere", 0

    def load_weights(self, weights: Any) -> None:
        self.pushes += 1
        if self.where == "push" and self.pushes == 2:
            next(iter(weights))
            raise RuntimeError("out of memory")
        super().load_weights(weights)

    def step(self) -> list[Completion]:
        if self.where == "canary" and self.pushes == 2 and self.num_unfinished == 1:
            raise RuntimeError("out of memory")
        return super().step()

    def sleep(self) -> None:
        if self.where == "sleep":
            raise RuntimeError("out of memory")


def fit_with_an_engine_that_chokes(run: Run, where: str) -> str:
    torch.set_num_threads(1)
    try:
        fit(run, [GracefulStop()], Choking(where))
    except (AppoError, RuntimeError) as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("strategy", "where"),
    [("fsdp2", "push"), ("fsdp2", "canary"), ("ddp", "push"), ("ddp", "canary"), ("ddp", "sleep")],
)
def test_no_rank_waits_for_one_that_failed_in_a_push(checkpoint, tmp_path, strategy, where) -> None:
    run = Run(checkpoint, strategy=strategy, max_steps=4, output=str(tmp_path))
    other, own = run_ranks(fit_with_an_engine_that_chokes, run, where, timeout=60.0)
    if where == "canary":
        assert own == "rank 1: Choking failed to step: RuntimeError: out of memory, right after a weight push"
        assert other == own
    else:
        assert own == "out of memory"
        assert other == "rank 1: RuntimeError: out of memory"


class OneSided(Reward):
    """Cannot score on rank 1."""

    def score(self, task: Task, response_text: str) -> Score:
        return Score(1 / (1 - int(os.environ["LOCAL_RANK"])), success=True)


def fit_with_a_reward_that_fails(run: Run) -> str:
    torch.set_num_threads(1)
    data = run.data()
    data.reward = OneSided()
    try:
        run.make_trainer([GracefulStop()]).fit(run.module(), datamodule=data)
    except (AppoError, ZeroDivisionError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_mistake_on_one_rank_is_told_to_the_others(checkpoint, strategy) -> None:
    other, own = run_ranks(fit_with_a_reward_that_fails, Run(checkpoint, strategy=strategy))
    assert own == "ZeroDivisionError: division by zero"
    assert other.endswith("rank 1: ZeroDivisionError: division by zero")


def validate_with_an_engine_that_breaks(run: Run) -> str:
    torch.set_num_threads(1)
    run.trainer = {"limit_val_batches": 1.0}
    try:
        run.make_trainer().validate(run.module(), run.data(Breaking(0, 99)), verbose=False)
    except AppoError as error:
        return str(error)
    return "nothing"


def test_all_ranks_stop_a_validation_too(checkpoint) -> None:
    run = Run(checkpoint, strategy="ddp", validation_size=12)
    for said in run_ranks(validate_with_an_engine_that_breaks, run):
        assert said == "rank 1: Breaking failed to step: RuntimeError: out of memory"


def fit_with_a_vllm_engine_that_breaks(run: Run, times: int) -> tuple[str, Result | None, int]:
    from appo_lightning.samplers.vllm import VLLMSampler

    class BreakingEngine(VLLMSampler):
        starts = steps = 0

        def start(self, *args: Any, **options: Any) -> None:
            super().start(*args, **options)
            self.starts += 1
            step = self._engine.step  # type: ignore[union-attr]

            def broken() -> Any:
                self.steps += 1
                if os.environ["LOCAL_RANK"] == "1" and self.starts <= times and self.steps % 40 == 0:
                    raise RuntimeError("out of memory")
                return step()

            self._engine.step = broken  # type: ignore[union-attr, method-assign]

    sampler = BreakingEngine(kv_cache_mb=64)
    return *fit_and_tell(run, sampler), sampler.starts


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_one_rank_alone_starts_a_fresh_vllm_engine(checkpoint) -> None:
    """vLLM's own process groups would wait for all ranks."""
    run = Run(checkpoint, strategy="ddp", max_steps=2)
    told = run_ranks(fit_with_a_vllm_engine_that_breaks, run, 1, timeout=240.0)
    assert [starts for _, _, starts in told] == [1, 2]
    for error, result, _ in told:
        assert result is not None, error
        assert max(told[0][1].series("sync/logprob_gap_max")) < 1e-3  # type: ignore[union-attr]
