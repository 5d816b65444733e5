"""Learning-rate schedules as factors of the peak."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from appo_lightning.errors import ConfigurationError


def learning_rate_factor(
    schedule: Literal["constant", "linear", "cosine"], *, warmup_steps: int, last_step: int
) -> Callable[[int], float]:
    """Factor of the peak learning rate by step (counted from 0).

    Args:
        schedule: course after the warm-up; linear and cosine reach 0 at ``last_step``.
        warmup_steps: the factor rises linearly to 1 over these.
        last_step: steps of the whole run; unused by "constant".

    Raises:
        ConfigurationError: a falling schedule without a known last step after the warm-up.
    """
    if schedule != "constant" and not warmup_steps < last_step < 2**62:
        raise ConfigurationError(
            f"optimizer.schedule = {schedule!r} needs a last step after the {warmup_steps} warm-up steps, "
            f"got {last_step}; set trainer.max_steps or use schedule: constant"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / (last_step - warmup_steps))
        return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor
