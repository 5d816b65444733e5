"""The bar of rollouts shows where they are, and costs little."""

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from appo_lightning.callbacks import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now, time=time.time))
    return clock


def test_the_bar_is_drawn_twice_a_second_and_gone_with_the_last_rollout(
    capsys: pytest.CaptureFixture[str], clock: SimpleNamespace
) -> None:
    bar = progress.RolloutProgressBar()
    bar.enable()
    for seconds, done, shown in ((0.0, 1, ""), (0.4, 2, ""), (0.2, 3, "3/6"), (0.4, 4, ""), (0.2, 5, "5/6")):
        clock.now += seconds
        bar.rollout("roots", done, 6)
        out = capsys.readouterr().out
        assert ("roots" in out and shown in out and "00:00" in out) if shown else out == ""
    bar.rollout("roots", 6, 6)
    assert set(capsys.readouterr().out) <= set("\n\r\x1b[A ")  # wiped out
    bar.rollout("branches", 1, 2)
    clock.now += 0.6
    bar.rollout("branches", 1, 2)
    shown = capsys.readouterr().out
    assert "branches" in shown
    assert "1/2" in shown
    bar.on_exception()
    assert set(capsys.readouterr().out) <= set("\n\r\x1b[A ")


def test_a_stage_that_is_over_at_once_is_not_drawn(capsys: pytest.CaptureFixture[str], clock: SimpleNamespace) -> None:
    bar = progress.RolloutProgressBar()
    bar.enable()
    for stage in ("roots", "branches", "branches"):
        for done in (1, 2):
            clock.now += 0.3
            bar.rollout(stage, done, 2)
    assert capsys.readouterr().out == ""


def test_a_disabled_bar_draws_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress.RolloutProgressBar()
    bar.disable()
    for done in (1, 2):
        bar.rollout("roots", done, 2)
    assert capsys.readouterr().out == ""


def test_a_mini_batch_draws_the_bar_of_the_run_once(capsys: pytest.CaptureFixture[str]) -> None:
    bar = progress.RolloutProgressBar()
    bar.enable()
    bar.train_progress_bar = Tqdm(total=4, file=sys.stdout)
    capsys.readouterr()
    trainer: Any = SimpleNamespace(progress_bar_metrics={"reward": 0.5})
    bar.on_train_batch_end(trainer, None, None, None, batch_idx=1)  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert shown.count("2/4") == 1
    assert "reward=0.500" in shown


def test_each_draw_of_the_bar_of_rollouts_is_one_write(monkeypatch: pytest.MonkeyPatch, clock: SimpleNamespace) -> None:
    written: list[str] = []
    screen = SimpleNamespace(write=written.append, flush=lambda: None, encoding="utf-8")
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stdout=screen))
    bar = progress.RolloutProgressBar()
    bar.enable()
    for done in (1, 1, 2):
        bar.rollout("roots", done, 2)
        clock.now += 0.6
    assert len(written) == 2
    shown, wiped_out = (text.split("\r")[1] for text in written[-2:])
    assert wiped_out == " " * len(shown)
