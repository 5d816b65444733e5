"""AppoModule: the policy under APPO's clipped, token-mean loss."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from appo_lightning.algorithm import (
    clipped_policy_loss,
    kl_penalty,
    masked_importance_weight,
    truncated_importance_weight,
)
from appo_lightning.batching import (
    EvaluationBatch,
    PaddedSequences,
    ProcedureBatch,
    TraceScores,
    pad_trajectories,
    padding_of,
    response_mask,
    split_by_tokens,
)
from appo_lightning.errors import ConfigurationError, DataError, NonFiniteLossError
from appo_lightning.metrics import MetricSums, log_metrics
from appo_lightning.policy.causal_lm import TokenScores
from appo_lightning.policy.options import OptimizerOptions, PolicyOptions
from appo_lightning.policy.snapshot import PolicySnapshot
from appo_lightning.policy.tree_packing import TreePacking, pack_tree, plan_packs
from appo_lightning.policy_module import PolicyModule, require_budget
from appo_lightning.rollout.serialise import tree_to_dict
from appo_lightning.types import Trajectory


@dataclass
class LossOptions:
    """The clipped policy loss.

    Args:
        clip_low: the ratio is clipped below 1 - clip_low.
        clip_high: the ratio is clipped above 1 + clip_high.
        dual_clip: bound on the loss of tokens with negative advantage, as a multiple of it; null turns it off.
        drop_lower_clipped: responses with more than one token beyond dual_clip leave the loss (published).
        kl: estimator of the KL divergence to the policy at the start of the run; "none" costs nothing.
        kl_coefficient: weight of that term.
        importance_cap: weight tokens by the ratio of the trainer's to the sampler's probability, at most this; null
            turns it off.
        importance_mode: what happens to tokens beyond the cap: "truncate" gives them its weight, "mask" none.
        importance_floor: tokens with a smaller ratio are left out too; needs "mask".
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    drop_lower_clipped: bool = True
    kl: Literal["none", "k1", "k2", "k3"] = "none"
    kl_coefficient: float = 0.0
    importance_cap: float | None = None
    importance_mode: Literal["truncate", "mask"] = "truncate"
    importance_floor: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise ConfigurationError(f"model.loss.clip_low must be in [0, 1], got {self.clip_low}")
        if not 0 <= self.clip_high < math.inf:
            raise ConfigurationError(f"model.loss.clip_high must be a number >= 0, got {self.clip_high}")
        if self.dual_clip is not None and not 1 < self.dual_clip < math.inf:
            raise ConfigurationError(f"model.loss.dual_clip must be greater than 1 or null, got {self.dual_clip}")
        if self.importance_cap is not None and not 0 < self.importance_cap < math.inf:
            raise ConfigurationError(f"model.loss.importance_cap must be positive or null, got {self.importance_cap}")
        if self.importance_mode == "mask" and self.importance_cap is None:
            raise ConfigurationError(
                "model.loss.importance_mode: mask has no effect without importance_cap; set one, as 5"
            )
        if self.importance_floor is not None:
            if self.importance_mode != "mask":
                raise ConfigurationError("model.loss.importance_floor has no effect without importance_mode: mask")
            if not 0 < self.importance_floor < (self.importance_cap or 0.0):
                raise ConfigurationError(
                    f"model.loss.importance_floor must be between 0 and importance_cap = {self.importance_cap:g}, got "
                    f"{self.importance_floor:g}; 0.5 is usual"
                )
        if not 0 <= self.kl_coefficient < math.inf:
            raise ConfigurationError(f"model.loss.kl_coefficient must be a number >= 0, got {self.kl_coefficient}")
        if (self.kl == "none") != (self.kl_coefficient == 0):
            raise ConfigurationError(
                f"model.loss.kl = {self.kl!r} and kl_coefficient = {self.kl_coefficient:g} belong together: "
                "set both or neither"
            )
        if self.dual_clip is None and self.drop_lower_clipped:
            raise ConfigurationError(
                "model.loss.drop_lower_clipped needs dual_clip; set a dual_clip or drop_lower_clipped: false"
            )


@dataclass(slots=True)
class _Chunk:
    """Rows of one forward pass, on the CPU."""

    rows: Tensor  # [b] row numbers
    sequences: PaddedSequences  # of these rows
    lengths: Tensor  # tokens of what is computed and padded to one length: the rows, or a pack of them
    packing: TreePacking | None = None


@dataclass(slots=True)
class _Unscored:
    """Rows of a micro-batch that no forward has scored yet."""

    batch: ProcedureBatch
    here: Tensor  # [u] row numbers in the micro-batch
    there: Tensor  # [u] row numbers in the batch


@dataclass(slots=True)
class _MicroBatch:
    """Some rows of a mini-batch, on the device."""

    sequences: PaddedSequences
    old_logprobs: Tensor  # [b, l]
    behaviour_logprobs: Tensor  # [b, l]
    advantages: Tensor  # [b, l]
    reference_logprobs: Tensor | None  # [b, l]
    packing: TreePacking | None = None  # of the sequences
    unscored: _Unscored | None = None  # rows that take their old log-probs from this forward


class AppoModule(PolicyModule):
    """Trains a policy on branched rollouts.

    Args:
        policy: which model, full or LoRA.
        optimizer: AdamW, schedule, clipping.
        loss: the clipped policy loss.
        micro_batch_tokens: tokens of one forward and backward pass, padding included; a longer row still goes alone.
        score_batch_tokens: the same for forward passes without gradient.
        shared_prefixes: compute what rows have in common once: instructions, a prompt's roots, a branch's prefix. Needs
            sdpa attention without sliding windows. "auto": on a CPU, where the model can; on a GPU it took longer than
            it saved (``docs/benchmarks/gpu.md``).
    """

    def __init__(
        self,
        policy: PolicyOptions,
        optimizer: OptimizerOptions = OptimizerOptions(),  # noqa: B008  # jsonargparse shows it; never mutated
        loss: LossOptions = LossOptions(),  # noqa: B008  # likewise
        micro_batch_tokens: int = 16384,
        score_batch_tokens: int = 32768,
        shared_prefixes: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__(policy, optimizer, micro_batch_tokens)
        require_budget("score_batch_tokens", score_batch_tokens)
        self.loss_options = loss
        self.score_batch_tokens = score_batch_tokens
        self.shared_prefixes = shared_prefixes
        self._shares_prefixes = False  # until the policy is there and can
        self._reference: PolicySnapshot | None = None
        self._phase_start: PolicySnapshot | None = None
        self._previous: PolicySnapshot | None = None
        self._validation = MetricSums()

    # --- what the rollouts ask of the policy ------------------------------------------------------------------------

    @property
    def weights_version(self) -> int:
        """Optimiser steps so far: grows with every change of the weights."""
        return int(self.trainer.global_step)

    def score(self, trajectories: Sequence[Trajectory], *, temperature: float) -> TraceScores:
        """Log-probs and entropies of the sampled tokens with the current weights, in the order given."""
        sequences = pad_trajectories(trajectories)
        with self.scoring():
            scored = self._score_rows(sequences, temperature)
        assert scored.entropies is not None
        answers = response_mask(trajectories)
        logprobs, entropies = (values.numpy()[answers] for values in (scored.logprobs, scored.entropies))
        return TraceScores(torch.from_numpy(logprobs), torch.from_numpy(entropies))

    def score_previous(self, trajectories: Sequence[Trajectory], *, temperature: float) -> Tensor:
        """Log-probs [n], as of ``score``, by the weights at the beginning of the phase before this one."""
        if self._previous is None:
            raise ConfigurationError(
                "data.branching.gain_baseline = 'previous' needs the weights of an earlier rollout phase, and the "
                "checkpoint lies inside a phase of a run that kept none; resume with 'behaviour'"
            )
        with self._previous.active():
            return self.score(trajectories, temperature=temperature).logprobs

    def on_phase_begin(self) -> None:
        """Called when a rollout phase has sampled its roots: its policy becomes the next phase's previous one."""
        if self._datamodule().branching.gain_baseline != "previous":
            return
        if self._phase_start is None or self._previous is None:
            self._phase_start, self._previous = PolicySnapshot(self.policy), PolicySnapshot(self.policy)
            return
        self._previous, self._phase_start = self._phase_start, self._previous
        self._phase_start.take()

    def _datamodule(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _score_rows(self, sequences: PaddedSequences, temperature: float) -> TokenScores:
        """Scores [B, L] on the CPU, in chunks of similar length; every rank runs the same number of forwards."""
        logprobs = torch.zeros(sequences.mask.shape)
        entropies = torch.zeros(sequences.mask.shape)
        chunks = self._split(sequences, self.score_batch_tokens)
        for index in range(self.global_max(len(chunks))):
            chunk = chunks[index] if index < len(chunks) else None
            part = (_one_token() if chunk is None else chunk.sequences).to(self.device)
            packing = None if chunk is None or chunk.packing is None else chunk.packing.to(self.device)
            scored = self.policy.score(
                part.token_ids, part.lengths, mask=part.mask, temperature=temperature, entropy=True, packing=packing
            )
            if chunk is not None and scored.entropies is not None:
                width = part.mask.shape[1]
                logprobs[chunk.rows, :width] = scored.logprobs.cpu()
                entropies[chunk.rows, :width] = scored.entropies.cpu()
        return TokenScores(logprobs, entropies)

    def _split(self, sequences: PaddedSequences, budget: int) -> list[_Chunk]:
        """Rows on the CPU, in chunks of at most ``budget`` tokens."""
        if not self._shares_prefixes or (self.shared_prefixes == "auto" and self.device.type != "cpu"):
            chosen = split_by_tokens(sequences.lengths, budget)
            return [_Chunk(rows, sequences.rows(rows), sequences.lengths[rows]) for rows in chosen]
        chunks = []
        for pack in plan_packs(sequences.token_ids, sequences.lengths, budget=budget):
            part = sequences.rows(rows := torch.tensor(pack.rows))
            packing = pack_tree(part.token_ids, part.lengths, pack)
            chunks.append(_Chunk(rows, part, torch.tensor([pack.length]), packing))
        return chunks

    # --- training ----------------------------------------------------------------------------------------------------

    def check_policy(self) -> None:
        if not self.shared_prefixes:
            return
        try:
            self.policy.share_prefixes()
            self._shares_prefixes = True
        except ConfigurationError as error:
            if self.shared_prefixes != "auto":
                raise
            rank_zero_info(f"Common beginnings of sequences are computed for each of them: {error}")

    def on_policy_built(self) -> None:
        if self.loss_options.kl != "none":
            self._reference = PolicySnapshot(self.policy)

    def training_step(self, batch: ProcedureBatch, batch_idx: int) -> None:
        if batch.advantages is None:
            raise ConfigurationError(
                "batch.advantages is None: add appo_lightning.callbacks.ProcedureAdvantageScaling to trainer.callbacks"
            )
        num_tokens = self.global_sum(batch.mask.sum().float()).clamp(min=1)
        started = time.monotonic()
        metrics = MetricSums()
        micro_batches = self._micro_batches(batch, metrics)
        sums: list[dict[str, Tensor]] = []
        try:
            step = self.optimiser_step(
                micro_batches,
                lambda part: self._loss(part, batch.temperature, num_tokens, sums),
                idle=_idle_micro_batch(self.device),
            )
        except NonFiniteLossError as error:
            path = self._save_rollouts(batch)
            raise NonFiniteLossError(f"{error}; the rollouts of this step are in {path}") from error
        _add_sums(metrics, sums)
        metrics.add_all({"loss/grad_norm": step.grad_norm, "loss/learning_rate": step.learning_rate})
        metrics.add("loss/tokens", float(num_tokens))
        seconds = time.monotonic() - started
        metrics.add("time/update", seconds)
        metrics.add("time/trained_tokens_per_second", float(num_tokens) / seconds)
        log_metrics(self.trainer, metrics)

    def _loss(self, part: _MicroBatch, temperature: float, num_tokens: Tensor, sums: list[dict[str, Tensor]]) -> Tensor:
        """The loss; appends what it tells about itself, as sums over tokens and their number ``tokens``."""
        options, mask = self.loss_options, part.sequences.mask
        scored = self.policy.score(
            part.sequences.token_ids,
            part.sequences.lengths,
            mask=mask,
            temperature=temperature,
            entropy=part.unscored is not None,
            packing=part.packing,
        )
        if part.unscored is not None:
            _record_scores(scored, part.old_logprobs, part.unscored)
        weight = self._importance_weight(part)
        result = clipped_policy_loss(
            scored.logprobs,
            part.old_logprobs,
            part.advantages,
            mask,
            clip_low=options.clip_low,
            clip_high=options.clip_high,
            dual_clip=options.dual_clip,
            drop_lower_clipped=options.drop_lower_clipped,
            normaliser=num_tokens,
            weight=weight,
        )
        loss, count = result.loss, mask.sum()
        told = {"tokens": count, "loss/policy": result.loss.detach() * num_tokens}
        for name in ("clip_fraction", "lower_clip_fraction", "approx_kl", "dropped_fraction"):
            told[f"loss/{name}"] = getattr(result, name) * count
        if part.reference_logprobs is not None and options.kl != "none":
            divergence = kl_penalty(scored.logprobs, part.reference_logprobs, options.kl) * mask
            loss = loss + options.kl_coefficient * divergence.sum() / num_tokens
            told["loss/kl_reference"] = divergence.detach().sum()
        if options.importance_cap is not None:
            ratio = (part.old_logprobs - part.behaviour_logprobs)[mask].exp()
            limited = ratio > options.importance_cap
            if options.importance_floor is not None:
                limited |= ratio < options.importance_floor
            told["loss/importance_limited_fraction"] = limited.sum()
        sums.append(told)
        return loss

    def _importance_weight(self, part: _MicroBatch) -> Tensor | None:
        """[b, l] how the tokens weigh because sampler and trainer disagree; None: as they are."""
        options = self.loss_options
        if options.importance_cap is None:
            return None
        logprobs = part.old_logprobs, part.behaviour_logprobs
        if options.importance_mode == "truncate":
            return truncated_importance_weight(*logprobs, options.importance_cap)
        return masked_importance_weight(*logprobs, floor=options.importance_floor or 0.0, cap=options.importance_cap)

    def _micro_batches(self, batch: ProcedureBatch, metrics: MetricSums) -> list[_MicroBatch]:
        assert batch.advantages is not None
        everything = batch.sequences.to(torch.device("cpu"))
        reference = None
        if self._reference is not None:
            with self._reference.active(), self.scoring():
                reference = self._score_rows(everything, batch.temperature).logprobs
        parts = []
        for chunk in self._split(everything, self.micro_batch_tokens):
            rows, tokens = chunk.rows, int(chunk.sequences.lengths.sum())
            metrics.add_sum("time/padding_share", *padding_of(chunk.lengths))
            metrics.add_sum("time/shared_token_share", tokens - int(chunk.lengths.sum()), tokens)
            sequences = chunk.sequences.to(batch.mask.device)
            width = sequences.mask.shape[1]
            parts.append(
                _MicroBatch(
                    sequences,
                    batch.old_logprobs[rows, :width],
                    batch.behaviour_logprobs[rows, :width],
                    batch.advantages[rows, :width],
                    None if reference is None else reference[rows, :width].to(self.device),
                    None if chunk.packing is None else chunk.packing.to(self.device),
                    _unscored(batch, rows),
                )
            )
        return parts

    def _save_rollouts(self, batch: ProcedureBatch) -> Path:
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"failed_step_{self.global_step}_rank_{self.global_rank}.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps(tree_to_dict(tree)) + "\n" for tree in batch.trees)
        return path

    # --- evaluation --------------------------------------------------------------------------------------------------

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        self._collect(batch, "val")

    def test_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        self._collect(batch, "test")

    def predict_step(self, batch: EvaluationBatch, batch_idx: int) -> EvaluationBatch:
        return batch

    def _collect(self, batch: EvaluationBatch, stage: str) -> None:
        scored = [trajectory for trajectory in batch.trajectories if trajectory.reward is not None]
        unscored = len(batch.trajectories) - len(scored)
        self._validation.add_sum(f"{stage}/unscored_share", unscored, len(batch.trajectories))
        for trajectory in scored:
            assert trajectory.reward is not None
            assert trajectory.success is not None
            self._validation.add(f"{stage}/success", float(trajectory.success))
            self._validation.add(f"{stage}/reward", trajectory.reward)
            self._validation.add(f"{stage}/response_tokens", len(trajectory.response_ids))
            self._validation.add(f"{stage}/sampled_tokens", trajectory.num_sampled)
            self._validation.add(f"{stage}/tool_calls", len(trajectory.tool_calls))
            for name, value in trajectory.reward_parts.items():
                self._validation.add(f"{stage}/reward_{name}", value)
        self._validation.add(f"{stage}/seconds", batch.seconds)

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation("test")

    def _finish_evaluation(self, stage: str) -> None:
        sums, self._validation = self._validation.gathered(), MetricSums()
        means = sums.means()
        if f"{stage}/unscored_share" in means and f"{stage}/success" not in means:
            raise DataError("none of the validation rollouts could be scored: the reward gave no value for any of them")
        means[f"{stage}/tasks"] = sums.count(f"{stage}/success")
        if self.trainer.state.fn == TrainerFn.FITTING:
            # Lightning counts a batch only after its validation; every other metric is written at the step it follows.
            means["step"] = float(self.trainer.global_step)
        for name, value in means.items():
            # Equal on all ranks already; without sync_dist Lightning doubts that, once per name.
            self.log(name, value, prog_bar=name.endswith("/success"), sync_dist=True)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self._phase_start is not None and self._previous is not None:
            checkpoint["snapshots"] = {
                "phase_start": self._phase_start.state_dict(),
                "previous": self._previous.state_dict(),
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.policy is not None and "snapshots" in checkpoint:
            self._phase_start, self._previous = PolicySnapshot(self.policy), PolicySnapshot(self.policy)
            self._phase_start.load_state_dict(checkpoint["snapshots"]["phase_start"])
            self._previous.load_state_dict(checkpoint["snapshots"]["previous"])


def _add_sums(metrics: MetricSums, sums: Sequence[dict[str, Tensor]]) -> None:
    """Means over tokens. After the last micro-batch: reading a number stops an accelerator."""
    for told in sums:
        values = dict(zip(told, torch.stack([value.float() for value in told.values()]).tolist(), strict=True))
        tokens = values.pop("tokens")
        for name, value in values.items():
            metrics.add_sum(name, value, tokens)


def _unscored(batch: ProcedureBatch, rows: Tensor) -> _Unscored | None:
    """Those of some rows of a batch [b]."""
    here = (rows >= batch.num_scored).nonzero()[:, 0]
    return _Unscored(batch, here, rows[here]) if len(here) else None


def _record_scores(scored: TokenScores, old_logprobs: Tensor, rows: _Unscored) -> None:
    """Write what a forward before any step says of rows into their batch and their micro-batch's log-probs [b, l]."""
    assert scored.entropies is not None
    logprobs, entropies = scored.logprobs.detach()[rows.here], scored.entropies[rows.here]
    old_logprobs[rows.here] = logprobs
    batch, width = rows.batch, logprobs.shape[1]
    for stored, values in (
        (batch.old_logprobs, logprobs),
        (batch.current_logprobs, logprobs),
        (batch.entropies, entropies),
    ):
        stored[rows.there, :width] = values


def _idle_micro_batch(device: torch.device) -> _MicroBatch:
    nothing = torch.zeros((1, 1), device=device)
    return _MicroBatch(_one_token().to(device), nothing, nothing, nothing, nothing)


def _one_token() -> PaddedSequences:
    """A row that scores nothing, for a rank that only keeps the others company."""
    return PaddedSequences(
        torch.zeros((1, 1), dtype=torch.long), torch.ones(1, dtype=torch.long), torch.zeros((1, 1), dtype=torch.bool)
    )
