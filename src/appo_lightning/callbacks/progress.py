"""A progress bar that also moves while rollouts are sampled."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm.auto import tqdm

_INTERVAL = 0.5  # seconds; drawing costs more than finishing a short rollout


class _RolloutBar(tqdm):
    """Drawn and wiped out by one write each, where tqdm takes three.

    Each write lets go of the interpreter, and threads of tools may keep it for milliseconds.
    """

    _width = 0  # of what is on the screen

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        text = str(self) if msg is None else msg
        down = abs(self.pos) if pos is None else pos
        self.fp.write("\n" * down + "\r" + text.ljust(self._width) + "\r" + "\x1b[A" * down)
        self.fp.flush()
        self._width = len(text)
        return True

    def clear(self, nolock: bool = False) -> None:
        self.display("")


class RolloutProgressBar(TQDMProgressBar):
    """Lightning's bar, and below it one for the rollouts of the current mini-batch or validation."""

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._rollouts: _RolloutBar | None = None  # made once: a new one takes longer than drawing it
        self._stage: str | None = None  # whose rollouts are under way
        self._began = self._due = 0.0  # of this stage, by tqdm's clock; of the next draw
        self._shown = False

    def rollout(self, stage: str, done: int, total: int) -> None:
        """Show how many rollouts of a stage are finished; not of one that is over before the first draw is due."""
        if not self.is_enabled:
            return
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._began, self._due = stage, time.time(), now + _INTERVAL
        if done == total:
            self._wipe_out()
            self._stage = None
        elif now >= self._due:
            self._due = now + _INTERVAL
            self._show(done, total)

    def _show(self, done: int, total: int) -> None:
        if self._rollouts is None:
            self._rollouts = _RolloutBar(
                total=total, position=2, leave=False, file=sys.stdout, dynamic_ncols=True, delay=_INTERVAL
            )
        bar, self._shown = self._rollouts, True
        bar.set_description_str(f"  {self._stage}", refresh=False)
        bar.n, bar.total, bar.start_t = done, total, self._began
        bar.refresh()

    def _wipe_out(self) -> None:
        if self._rollouts is not None and self._shown:
            self._rollouts.clear()
            self._shown = False

    # Before the bar above it, which leaves the cursor where the next line begins.

    def on_train_end(self, *args: Any) -> None:
        self._close()
        super().on_train_end(*args)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()
        super().on_validation_end(trainer, pl_module)

    def on_test_end(self, *args: Any) -> None:
        self._close()
        super().on_test_end(*args)

    def on_predict_end(self, *args: Any) -> None:
        self._close()
        super().on_predict_end(*args)

    def on_exception(self, *args: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self._rollouts is not None:
            self._wipe_out()
            self._rollouts.close()
            self._rollouts = self._stage = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        bar = self.train_progress_bar
        if self._should_update(batch_idx + 1, bar.total):
            bar.n = batch_idx + 1
            bar.set_postfix(self.get_metrics(trainer, pl_module))  # draws it; Lightning's draws it before as well

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {**trainer.progress_bar_metrics}  # without the number of the version, of which there is one
