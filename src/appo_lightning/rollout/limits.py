"""Budgets of a trajectory, and how it is sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from appo_lightning.errors import ConfigurationError
from appo_lightning.samplers.base import MIN_TEMPERATURE


@dataclass
class RolloutLimits:
    """Budgets of one trajectory, and how it is sampled.

    Args:
        max_prompt_tokens: longest prompt; a longer one is an error.
        max_response_tokens: sampled tokens and tool results together.
        max_tool_calls: calls per trajectory, malformed ones too. One call more is answered with a note; a second one
            ends the rollout.
        max_result_tokens: longest tool result; the rest is cut.
        tool_workers: tool calls that run at the same time.
        temperature: of sampling; log-probs are taken at the same temperature.
        top_p: nucleus sampling; 1 turns it off.
        top_k: sample among the k most probable tokens; 0 turns it off.
        min_p: sample among tokens at least this many times as probable as the most probable one; 0 turns it off.
        overlong: what training does about responses that are too long. "keep" scores and trains them like others;
            "drop" takes those cut by the budget out of the loss, their rewards still count in their group; "penalty"
            subtracts up to 1 from the reward over the last ``overlong_buffer`` tokens of the budget (DAPO).
        overlong_buffer: tokens over which the penalty grows; only for "penalty".
        stall_timeout_s: seconds without a sampled token after which an engine with work counts as broken. One step of
            TransformersSampler is a whole batch: raise this where a batch takes longer.
        max_restarts: fresh engines per phase for those that broke; what was sampled is kept. None where weights are
            sharded over processes: there, and after so many, the run stops.
        patience_s: seconds that the engine may stand idle in one phase because all that is left waits for tools; then
            those rollouts end unfinished and leave their groups, which train on without them. What is left out then
            depends on the clock. Null waits for every call, up to the tools' own limits; validation always does.
    """

    max_prompt_tokens: int = 1024
    max_response_tokens: int = 4096
    max_tool_calls: int = 3
    max_result_tokens: int = 1024
    tool_workers: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    overlong: Literal["keep", "drop", "penalty"] = "keep"
    overlong_buffer: int = 0
    stall_timeout_s: float = 600.0
    max_restarts: int = 2
    patience_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_response_tokens", "max_result_tokens", "tool_workers"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"rollout.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.stall_timeout_s < math.inf:
            raise ConfigurationError(f"rollout.stall_timeout_s must be positive and finite, got {self.stall_timeout_s}")
        if self.max_restarts < 0:
            raise ConfigurationError(f"rollout.max_restarts must be at least 0, got {self.max_restarts}")
        if self.patience_s is not None and not 0 < self.patience_s < math.inf:
            raise ConfigurationError(f"rollout.patience_s must be positive and finite, or null, got {self.patience_s}")
        if self.max_tool_calls < 0:
            raise ConfigurationError(f"rollout.max_tool_calls must be at least 0, got {self.max_tool_calls}")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ConfigurationError(
                f"rollout.temperature must be 0 (greedy) or a number from {MIN_TEMPERATURE} on, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"rollout.top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ConfigurationError(f"rollout.top_k must be at least 0, got {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise ConfigurationError(f"rollout.min_p must be in [0, 1], got {self.min_p}")
        if (self.overlong == "penalty") != (self.overlong_buffer != 0):
            raise ConfigurationError(
                f"rollout.overlong = {self.overlong!r} and overlong_buffer = {self.overlong_buffer} do not belong "
                "together: a penalty needs a buffer, nothing else has one"
            )
        if not 0 <= self.overlong_buffer <= self.max_response_tokens:
            raise ConfigurationError(
                f"rollout.overlong_buffer must be in [0, max_response_tokens = {self.max_response_tokens}], "
                f"got {self.overlong_buffer}"
            )
