"""The bar of rollouts shows where they are, and costs little."""

from types import SimpleNamespace

import pytest

from appo_lightning.callbacks import progress


def test_the_bar_is_drawn_when_it_appears_twice_a_second_and_gone_with_the_last_rollout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    bar = progress.RolloutProgressBar()
    bar.enable()
    bar.rollout("roots", 1, 4)
    assert "roots" in capsys.readouterr().out
    clock.now += 0.4
    bar.rollout("roots", 2, 4)
    assert capsys.readouterr().out == ""
    clock.now += 0.2
    bar.rollout("roots", 3, 4)
    assert "3/4" in capsys.readouterr().out
    bar.rollout("roots", 4, 4)
    assert set(capsys.readouterr().out) <= set("\n\r\x1b[A ")  # wiped out
    bar.rollout("branches", 1, 2)
    assert "branches" in capsys.readouterr().out
