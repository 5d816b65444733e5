"""Writes each token's advantage: dual-group, then scaled procedure by procedure."""

from __future__ import annotations

import math

import lightning as L
import torch

from appo_lightning.algorithm import (
    branch_advantage,
    dual_group_advantage,
    future_influence,
    gamma_from_half_life,
    scale_by_influence,
)
from appo_lightning.batching import ProcedureBatch
from appo_lightning.errors import ConfigurationError


class ProcedureAdvantageScaling(L.Callback):
    """Shares credit among a root and its branches, then scales it by how the future of each token has moved.

    Args:
        normalise_std: divide by the standard deviation of the group; false only centres.
        scaling: weight b of the future influence; 0 turns procedure-level scaling off (GRPO).
        half_life: of the influence's discount, in tokens.
        clip: half-width of the clip of the influence around 1; 0 clips at 10 only.
        high_only: the influence never falls below 1 (as published).
        centred: scale by 1 + b (influence - 1), which is 1 where nothing is known, instead of 1 + b influence.
        dual_clip: tokens whose ratio is beyond it do not count into the influence.
        safety_threshold: where the advantage is negative and the ratio beyond this, the influence is kept in [0.8, 1];
            null turns it off.
    """

    def __init__(
        self,
        normalise_std: bool = True,
        scaling: float = 1.0,
        half_life: float = 64.0,
        clip: float = 0.2,
        high_only: bool = True,
        centred: bool = False,
        dual_clip: float = 3.0,
        safety_threshold: float | None = 6.0,
    ) -> None:
        if not 0 <= scaling < math.inf:
            raise ConfigurationError(f"advantage.scaling must be a number >= 0, got {scaling}")
        if not 0 < half_life < math.inf:
            raise ConfigurationError(f"advantage.half_life must be a positive number of tokens, got {half_life}")
        if not 0 <= clip < 1:
            raise ConfigurationError(f"advantage.clip must be in [0, 1), got {clip}")
        if high_only and clip == 0 and scaling:
            raise ConfigurationError("advantage.high_only has no effect with clip = 0; set high_only: false")
        if not 1 < dual_clip < math.inf:
            raise ConfigurationError(f"advantage.dual_clip must be greater than 1, got {dual_clip}")
        if safety_threshold is not None and not 0 < safety_threshold < math.inf:
            raise ConfigurationError(f"advantage.safety_threshold must be positive or null, got {safety_threshold}")
        self.normalise_std, self.scaling, self.centred = normalise_std, scaling, centred
        self.gamma = gamma_from_half_life(half_life)
        self.clip, self.high_only = clip, high_only
        self.dual_clip, self.safety_threshold = dual_clip, safety_threshold

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: ProcedureBatch, batch_idx: int
    ) -> None:
        roots = slice(0, batch.num_roots)
        mask = batch.mask
        advantages = torch.zeros(mask.shape, device=mask.device)
        advantages[roots] = dual_group_advantage(
            batch.rewards[roots],
            batch.prompt_index[roots],
            mask[roots],
            batch.branch_reward,
            batch.branch_root,
            batch.branch_position,
            normalise_std=self.normalise_std,
        )
        if batch.branch_row is not None and len(batch.branch_row):
            advantages[batch.branch_row] = branch_advantage(
                batch.branch_reward,
                batch.prompt_index[batch.branch_root],
                mask[batch.branch_row],
                normalise_std=self.normalise_std,
            )
        if self.scaling:
            batch.influence = future_influence(
                batch.current_logprobs - batch.old_logprobs,
                advantages,
                mask,
                gamma=self.gamma,
                clip=self.clip,
                high_only=self.high_only,
                dual_clip=self.dual_clip,
                safety_threshold=self.safety_threshold,
            )
            advantages = scale_by_influence(advantages, batch.influence, weight=self.scaling, centred=self.centred)
        batch.advantages = advantages
