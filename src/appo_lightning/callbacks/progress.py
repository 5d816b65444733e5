"""A progress bar that also moves while rollouts are sampled."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm.auto import tqdm


class RolloutProgressBar(TQDMProgressBar):
    """Lightning's bar, and below it one for the rollouts of the current mini-batch or validation."""

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._rollouts: tqdm | None = None
        self._stage = ""
        self._drawn = 0.0

    def rollout(self, stage: str, done: int, total: int) -> None:
        """Show how many rollouts of a stage are finished."""
        if self.is_disabled or not self._is_enabled:
            return
        now = time.monotonic()
        if self._rollouts is None or stage != self._stage:
            self._close()
            self._rollouts = tqdm(
                desc=f"  {stage}", total=total, position=2, leave=False, file=sys.stdout, dynamic_ncols=True
            )
            self._stage, self._drawn = stage, now
        if done == total:
            self._close()
        elif now - self._drawn > 0.5:  # drawing costs more than finishing a short rollout
            self._rollouts.n, self._rollouts.total = done, total
            self._rollouts.refresh()
            self._drawn = now

    @property
    def _is_enabled(self) -> bool:
        return bool(self.is_enabled)

    def _close(self) -> None:
        if self._rollouts is not None:
            self._rollouts.close()
            self._rollouts = None

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items
