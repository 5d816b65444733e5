"""What a user chooses about the policy and its optimiser; plain dataclasses, cheap to import."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from appo_lightning.errors import ConfigurationError


@dataclass
class LoraOptions:
    """Low-rank adapters (PEFT): the base weights stay frozen.

    Args:
        rank: rank of the update.
        alpha: scale numerator; the update is multiplied by alpha / rank.
        target_modules: names of the adapted linear modules, or "all-linear".
    """

    rank: int = 16
    alpha: float = 32.0
    target_modules: str | list[str] = "all-linear"


@dataclass
class PolicyOptions:
    """Which model is trained, and how.

    Args:
        path: directory of a transformers checkpoint (with its tokenizer), or a Hub id.
        lora: train low-rank adapters instead of all weights; null trains all weights.
        dtype: dtype of the weights. Log-probs are computed in float32 always.
        attn_implementation: attention of the training forward, as transformers names it.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third slower.
        logit_chunk: tokens whose logits exist at a time; bounds memory at [logit_chunk, vocabulary].
    """

    path: str
    lora: LoraOptions | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False
    logit_chunk: int = 1024

    def __post_init__(self) -> None:
        if self.logit_chunk < 1:
            raise ConfigurationError(f"policy.logit_chunk must be at least 1, got {self.logit_chunk}")
        # Not in LoraOptions: the parser would take its error for "this is no LoraOptions, but perhaps null".
        if self.lora is not None and self.lora.rank < 1:
            raise ConfigurationError(f"policy.lora.rank must be at least 1, got {self.lora.rank}")
        if self.lora is not None and not 0 < self.lora.alpha < math.inf:
            raise ConfigurationError(f"policy.lora.alpha must be a positive number, got {self.lora.alpha}")


@dataclass
class OptimizerOptions:
    """AdamW and its learning-rate schedule.

    Args:
        learning_rate: peak learning rate.
        weight_decay: decoupled weight decay.
        betas: exponential decay rates of the two moments.
        warmup_steps: steps of linear warm-up from 0.
        schedule: what follows the warm-up; "cosine" and "linear" fall to 0 at the trainer's last step.
        max_grad_norm: gradients are scaled down to this global norm; null leaves them.
    """

    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    betas: tuple[float, float] = field(default=(0.9, 0.999))
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ConfigurationError(f"optimizer.learning_rate must be a positive number, got {self.learning_rate}")
        if not 0 <= self.weight_decay < math.inf:
            raise ConfigurationError(f"optimizer.weight_decay must be a number >= 0, got {self.weight_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigurationError(f"optimizer.betas must be in [0, 1), got {tuple(self.betas)}")
        if self.warmup_steps < 0:
            raise ConfigurationError(f"optimizer.warmup_steps must be at least 0, got {self.warmup_steps}")
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            raise ConfigurationError(
                f"optimizer.max_grad_norm must be a positive number or null, got {self.max_grad_norm}"
            )
