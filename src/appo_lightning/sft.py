"""The cold start: supervised fine-tuning on demonstrations, before reinforcement learning.

Axis letters: ``B`` demonstrations, ``L`` padded tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from torch import Tensor

from appo_lightning.batching import split_by_tokens
from appo_lightning.errors import ConfigurationError, DataError
from appo_lightning.metrics import MetricSums, log_metrics
from appo_lightning.policy.options import OptimizerOptions, PolicyOptions
from appo_lightning.policy_module import PolicyModule
from appo_lightning.rollout.formats.base import CallFormat, CallSyntax
from appo_lightning.rollout.formats.tags import TagFormat
from appo_lightning.rollout.imitation import NOT_TRAINED, TokenRow, encode_demonstration
from appo_lightning.rollout.seeds import derive_seed
from appo_lightning.tasks.demonstrations import LABELS, DemonstrationSource
from appo_lightning.tools.base import Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class TokenRows:
    """Sequences of one batch."""

    token_ids: Tensor  # [B, L] right-padded
    lengths: Tensor  # [B]
    labels: Tensor  # [B, L] index into LABELS of the tokens to train on; NOT_TRAINED elsewhere
    was_cut: Tensor  # [B] bool

    @property
    def trained(self) -> Tensor:
        """[B, L] bool, the tokens in the loss."""
        return self.labels != NOT_TRAINED

    def rows(self, index: Tensor) -> TokenRows:
        """Some rows, with the padding that they need."""
        width = int(self.lengths[index].max())
        return TokenRows(
            self.token_ids[index, :width], self.lengths[index], self.labels[index, :width], self.was_cut[index]
        )

    def to(self, device: torch.device) -> TokenRows:
        """On another device; Lightning calls this instead of walking through the fields."""
        return TokenRows(
            self.token_ids.to(device), self.lengths.to(device), self.labels.to(device), self.was_cut.to(device)
        )


class SFTModule(PolicyModule):
    """Trains a policy to imitate demonstrations.

    The loss is the negative log-likelihood per trained token; its mean is over all trained tokens of the step, on all
    processes and in all micro-batches.

    Args:
        policy: which model, full or LoRA.
        optimizer: AdamW, schedule, clipping.
        micro_batch_tokens: tokens of one forward and backward pass, padding included; a longer row still goes alone.
    """

    def __init__(
        self,
        policy: PolicyOptions,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008  # jsonargparse shows it; never mutated
        micro_batch_tokens: int = 16384,
    ) -> None:
        super().__init__(policy, optimizer, micro_batch_tokens)

    def training_step(self, batch: TokenRows, batch_idx: int) -> None:
        num_tokens = self.global_sum(batch.trained.sum().float()).clamp(min=1)
        metrics = MetricSums()

        def loss_of(part: TokenRows) -> Tensor:
            logprobs = self.policy.score(part.token_ids, part.lengths, mask=part.trained).logprobs
            _measure(metrics, logprobs.detach(), part)
            return -logprobs.sum() / num_tokens

        chunks = split_by_tokens(batch.lengths.cpu(), self.micro_batch_tokens)
        step = self.optimiser_step([batch.rows(rows.to(self.device)) for rows in chunks], loss_of)
        metrics.add_all({"sft/grad_norm": step.grad_norm, "sft/learning_rate": step.learning_rate})
        metrics.add("sft/tokens", float(num_tokens))
        metrics.add("sft/cut_fraction", batch.was_cut.float())
        means = log_metrics(self.trainer, metrics)
        for name in ("loss", "decision_accuracy"):
            if (value := means.get(f"sft/{name}")) is not None:
                # Already reduced and written: for the progress bar and for callbacks that monitor.
                self.log(f"sft/{name}", value, prog_bar=True, logger=False)


def _measure(metrics: MetricSums, logprobs: Tensor, part: TokenRows) -> None:
    """Add the loss, and by label the share of tokens that have more than half of the probability."""
    trained = part.trained
    metrics.add("sft/loss", -logprobs[trained])
    metrics.add("sft/accuracy", logprobs[trained].exp() > 0.5)
    for index, label in enumerate(LABELS):
        metrics.add(f"sft/{label}_accuracy", logprobs[part.labels == index].exp() > 0.5)


class DemonstrationDataModule(L.LightningDataModule):
    """Batches of tokenised demonstrations, the same in every run of the same seed.

    Args:
        source: the demonstrations, in the paper's tags.
        tools: that they call; the chat template shows them where the call format wants that.
        call_format: how calls are written; null is ``TagFormat``, the paper's tags.
        batch_size: demonstrations of one optimiser step, over all processes.
        steps: optimiser steps of one epoch, copy warm-up included; null: one pass over the source after the warm-up.
            Longer runs go through the source again, in another order.
        max_length: longer sequences are cut at the end (metric ``sft/cut_fraction``).
        copy_warmup_steps: begin with so many steps on random token strings that are written twice, with the loss on the
            second half. A policy from scratch learns to copy from its context that way; a pretrained one can already.
        copy_length: tokens of such a string.
        seed: of the order and of the random strings.
    """

    def __init__(
        self,
        source: DemonstrationSource,
        tools: list[Tool] = [],  # noqa: B006  # jsonargparse shows it; never mutated
        call_format: CallFormat | None = None,
        batch_size: int = 32,
        steps: int | None = None,
        max_length: int = 4096,
        copy_warmup_steps: int = 0,
        copy_length: int = 12,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_length", max_length, 2),
            ("copy_warmup_steps", copy_warmup_steps, 0),
            ("copy_length", copy_length, 1),
        ):
            if value < least:
                raise ConfigurationError(f"data.{name} must be at least {least}, got {value}")
        if steps is not None and steps <= copy_warmup_steps:
            raise ConfigurationError(
                f"data.steps must be more than the {copy_warmup_steps} copy_warmup_steps it includes, got {steps}"
            )
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"data.tools: the names of tools must differ, got {', '.join(names)}")
        if len(source) == 0:
            raise DataError("data.source has no demonstrations")
        self.source, self.batch_size, self.max_length, self.seed = source, batch_size, max_length, seed
        self.tools, self.call_format = tools, call_format or TagFormat()
        self._syntax: CallSyntax | None = None
        self.copy_warmup_steps, self.copy_length = copy_warmup_steps, copy_length
        self.steps = steps if steps is not None else copy_warmup_steps + -(-len(source) // batch_size)

    def setup(self, stage: str) -> None:
        assert self.trainer is not None
        if self.batch_size % self.trainer.world_size:
            raise ConfigurationError(
                f"data.batch_size must be a multiple of the {self.trainer.world_size} processes, got {self.batch_size}"
            )

    def train_dataloader(self) -> Any:
        return DemonstrationBatches(self)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's; exists when batches are drawn."""
        assert self.trainer is not None
        return cast(PolicyModule, self.trainer.lightning_module).policy.tokenizer

    @property
    def syntax(self) -> CallSyntax:
        """The call format, for the policy's tokenizer; checked when it is first asked for."""
        if self._syntax is None:
            for tool in self.tools:
                tool.prepare()
            self._syntax = self.call_format.bind(self.tokenizer, self.tools)
        return self._syntax

    def close(self) -> None:
        """Release what the tools needed to describe themselves. Safe to call twice."""
        for tool in self.tools:
            tool.close()

    def batch(self, number: int, rank: int = 0, world_size: int = 1) -> TokenRows:
        """The ``number``-th batch of the run: a pure function of the arguments, the options and the tokenizer."""
        first = number * self.batch_size
        places = range(first + rank, first + self.batch_size, world_size)
        if number < self.copy_warmup_steps:
            return collate([self._copy_row(place) for place in places])
        skipped = self.copy_warmup_steps * self.batch_size
        return collate([self._demonstration_row(place - skipped) for place in places])

    def _demonstration_row(self, place: int) -> TokenRow:
        epoch, position = divmod(place, len(self.source))
        demonstration = self.source.demonstration(self._order(epoch)[position])
        return encode_demonstration(demonstration, self.tokenizer, self.syntax, max_length=self.max_length)

    def _order(self, epoch: int) -> list[int]:
        cached: tuple[int, list[int]] | None = getattr(self, "_cached_order", None)
        if cached is None or cached[0] != epoch:
            order = list(range(len(self.source)))
            random.Random(derive_seed(self.seed, "order", epoch)).shuffle(order)
            cached = self._cached_order = (epoch, order)
        return cached[1]

    def _copy_row(self, place: int) -> TokenRow:
        rng = random.Random(derive_seed(self.seed, "copy", place))
        tokenizer = self.tokenizer
        special = set(tokenizer.all_special_ids)
        ids = [token for token in range(len(tokenizer)) if token not in special]
        string = rng.choices(ids, k=self.copy_length)
        labels = [NOT_TRAINED] * self.copy_length + [LABELS.index("copied")] * self.copy_length
        return TokenRow(string + string, labels)


class DemonstrationBatches:
    """Training batches for Lightning: sized, and stateful, so that a resumed run continues with the next batch."""

    def __init__(self, data: DemonstrationDataModule) -> None:
        assert data.trainer is not None
        self._data, self._rank, self._world_size = data, data.trainer.global_rank, data.trainer.world_size
        self.epoch = 0
        self.position = 0  # batches drawn in this epoch

    def __len__(self) -> int:
        return self._data.steps

    def __iter__(self) -> Iterator[TokenRows]:
        for position in range(self.position, len(self)):
            batch = self._data.batch(self.epoch * len(self) + position, self._rank, self._world_size)
            # Before the yield: checkpoints are taken while this is suspended, and nothing runs after the last one.
            self.position = position + 1
            if self.position == len(self):
                self.epoch, self.position = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Where the next batch is."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.epoch, self.position = state["epoch"], state["position"]


def collate(rows: Sequence[TokenRow]) -> TokenRows:
    """Rows as padded tensors."""
    width = max(len(row.token_ids) for row in rows)
    return TokenRows(
        token_ids=torch.tensor([row.token_ids + [0] * (width - len(row.token_ids)) for row in rows]),
        lengths=torch.tensor([len(row.token_ids) for row in rows]),
        labels=torch.tensor([row.labels + [NOT_TRAINED] * (width - len(row.labels)) for row in rows]),
        was_cut=torch.tensor([row.was_cut for row in rows]),
    )
