"""Rollout trees to padded tensors.

Axis letters: ``B`` rows, ``L`` padded tokens (prompt and response), ``K`` branches. A row is a whole sequence: prompt,
then response, right-padded; so a position in a row is ``len(prompt_ids)`` more than the response position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from appo_lightning.types import RolloutTree, Trajectory


@dataclass(slots=True)
class TraceScores:
    """What the policy thinks of the response tokens of some trajectories, one after the other. CPU, float32."""

    logprobs: Tensor  # [n]; 0 where not sampled
    entropies: Tensor  # [n]; 0 where not sampled

    @classmethod
    def joined(cls, parts: Sequence[TraceScores]) -> TraceScores:
        """Those of all parts, in order."""
        if not parts:
            return cls(torch.zeros(0), torch.zeros(0))
        return cls(torch.cat([part.logprobs for part in parts]), torch.cat([part.entropies for part in parts]))

    def split(self, sizes: Sequence[int]) -> list[TraceScores]:
        """Parts of so many tokens."""
        return list(map(TraceScores, self.logprobs.split_with_sizes(sizes), self.entropies.split_with_sizes(sizes)))


@dataclass(slots=True)
class PaddedSequences:
    """Whole sequences as rows."""

    token_ids: Tensor  # [B, L] int64
    lengths: Tensor  # [B] prompt + response
    mask: Tensor  # [B, L] bool, True where the policy sampled the token

    def rows(self, index: Tensor) -> PaddedSequences:
        """Some rows, with the padding that they need."""
        width = int(self.lengths[index].max())
        return PaddedSequences(self.token_ids[index, :width], self.lengths[index], self.mask[index, :width])

    def to(self, device: torch.device) -> PaddedSequences:
        """On another device."""
        return PaddedSequences(self.token_ids.to(device), self.lengths.to(device), self.mask.to(device))


@dataclass(slots=True)
class ProcedureBatch:
    """One mini-batch: whole trees of whole prompts.

    Rows are roots, tree by tree; with ``train_branches`` the branches follow as further rows. Branches always enter as
    ``K`` numbers for the roots' credit.
    """

    sequences: PaddedSequences
    behaviour_logprobs: Tensor  # [B, L] of the sampler
    old_logprobs: Tensor  # [B, L] of the trainer's weights that sampled the row
    current_logprobs: Tensor  # [B, L] of the trainer's weights when the branches were chosen
    entropies: Tensor  # [B, L] with the current weights
    prompt_lengths: Tensor  # [B]
    rewards: Tensor  # [B]
    prompt_index: Tensor  # [B] tree of each row
    policy_version: Tensor  # [B]
    branch_root: Tensor  # [K] row of the root
    branch_position: Tensor  # [K] last kept token, position in the root's row; the prefix ends with it
    branch_score: Tensor  # [K]
    branch_reward: Tensor  # [K]
    branch_row: Tensor | None  # [K] row of the branch, with train_branches
    num_roots: int  # the first rows; the others are branches
    temperature: float
    trees: list[RolloutTree]
    fallback: Tensor  # [num_roots] bool: the gain was only noise, entropy alone chose
    num_scored: int  # the first rows; old and current log-probs and entropies of the others: by the step's own forward
    advantages: Tensor | None = None  # [B, L], written by ProcedureAdvantageScaling
    influence: Tensor | None = None  # [B, L], written by ProcedureAdvantageScaling

    @property
    def mask(self) -> Tensor:
        """[B, L] bool."""
        return self.sequences.mask

    def to(self, device: torch.device) -> ProcedureBatch:
        """On another device; Lightning calls this instead of walking through the fields."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor | PaddedSequences)
        }
        return replace(self, **moved)


class EvaluationBatch:
    """Rollouts of validation questions; not a container that Lightning would walk through."""

    def __init__(self, trees: list[RolloutTree], seconds: float) -> None:
        self.trees, self.seconds = trees, seconds

    @property
    def trajectories(self) -> list[Trajectory]:
        """All rollouts."""
        return [root for tree in self.trees for root in tree.roots]


def split_by_tokens(lengths: Tensor, budget: int) -> list[Tensor]:
    """Row indices in chunks of similar length, each at most ``budget`` tokens with its padding.

    The longest rows come first, so that memory peaks early. A row longer than the budget is a chunk of its own.

    Args:
        lengths: [B] tokens of each row.
        budget: rows of a chunk times the longest of them.
    """
    order = lengths.argsort(descending=True, stable=True)
    chunks, start = [], 0
    while start < len(order):
        size = max(1, budget // int(lengths[order[start]]))
        chunks.append(order[start : start + size])
        start += size
    return chunks


def padding_of(lengths: Tensor) -> tuple[int, int]:
    """Padding among the tokens of one padded chunk, and all its tokens."""
    padded = len(lengths) * int(lengths.max())
    return padded - int(lengths.sum()), padded


def pad_trajectories(trajectories: Sequence[Trajectory]) -> PaddedSequences:
    """Trajectories as rows, in order."""
    width = max((len(t.prompt_ids) + len(t.response_ids) for t in trajectories), default=1)
    token_ids = np.zeros((len(trajectories), width), dtype=np.int64)
    mask = np.zeros((len(trajectories), width), dtype=np.bool_)
    lengths = np.zeros(len(trajectories), dtype=np.int64)
    # NumPy: its small arrays cost a fraction of torch's.
    for row, trajectory in enumerate(trajectories):
        start, stop = len(trajectory.prompt_ids), len(trajectory.prompt_ids) + len(trajectory.response_ids)
        token_ids[row, :start] = trajectory.prompt_ids
        token_ids[row, start:stop] = trajectory.response_ids
        mask[row, start:stop] = trajectory.sampled
        lengths[row] = stop
    return PaddedSequences(torch.from_numpy(token_ids), torch.from_numpy(lengths), torch.from_numpy(mask))


def token_mask(lengths: Sequence[int], starts: Sequence[int] | None = None) -> np.ndarray:
    """[B, longest] bool, True on ``lengths`` tokens of each row, from the first or from ``starts`` on."""
    first = np.array(starts or [0] * len(lengths), dtype=np.int32)[:, None]
    last = first + np.array(lengths, dtype=np.int32)[:, None]
    position = np.arange(last.max(initial=1), dtype=np.int32)
    return (position >= first) & (position < last)


def response_mask(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """[B, L] bool, True on the response of each row."""
    return token_mask([len(t.response_ids) for t in trajectories], [len(t.prompt_ids) for t in trajectories])


def pad_rows(
    values: Sequence[Sequence[float]] | Tensor, inside: np.ndarray, dtype: type[np.generic] = np.float32
) -> Tensor:
    """Values of the tokens of each row where the mask [B, L] is True, 0 elsewhere.

    Args:
        values: of each row, or [n] of all rows one after the other.
        inside: [B, L] bool.
        dtype: of the result.
    """
    found, wanted = [len(values)], [int(inside.sum())]
    if not isinstance(values, Tensor):
        found, wanted = [len(row) for row in values], inside.sum(axis=1).tolist()
    if found != wanted:
        raise ValueError(f"values must be as many as there are tokens, got {found} for {wanted}: give one per token")
    out = np.zeros(inside.shape, dtype=dtype)
    out[inside] = values.numpy() if isinstance(values, Tensor) else np.fromiter(chain.from_iterable(values), dtype)
    return torch.from_numpy(out)


def build_batch(
    trees: Sequence[RolloutTree],
    *,
    old: TraceScores,
    current: TraceScores,
    fallback: Sequence[bool],
    temperature: float,
    branch_old: TraceScores | None = None,
    branch_current: TraceScores | None = None,
    drop_overlong: bool = False,
    num_scored: int | None = None,
) -> ProcedureBatch:
    """Trees as one mini-batch.

    Args:
        trees: roots and branches scored by the reward.
        old: of the roots, by the weights that sampled them.
        current: of the roots, by the weights that chose the branches.
        fallback: per root, whether the gain was only noise.
        temperature: that the log-probs are taken at.
        branch_old: of the branches, by the weights that sampled them; given, branches become rows (``train_branches``).
        branch_current: of the branches, by the current weights; given with ``branch_old``.
        drop_overlong: no token of a response that was cut by its budget is trained on.
        num_scored: the scores of the rows behind these only hold places, which the training step fills; None: all are
            known.
    """
    roots = [root for tree in trees for root in tree.roots]
    branches = [branch for tree in trees for branch in tree.branches]
    extra = [branch.trajectory for branch in branches] if branch_old is not None else []
    rows = roots + extra
    if branch_old is not None and branch_current is not None:
        old, current = TraceScores.joined([old, branch_old]), TraceScores.joined([current, branch_current])
    sequences = pad_trajectories(rows)
    if drop_overlong:
        sequences.mask &= ~torch.tensor([row.stop_reason == "length" for row in rows], dtype=torch.bool)[:, None]
    answers = response_mask(rows)

    first_root, row_of_root = 0, []
    for tree in trees:
        row_of_root += [first_root + branch.point.root for branch in tree.branches]
        first_root += len(tree.roots)
    prompt_index = [i for i, tree in enumerate(trees) for _ in tree.roots]
    if extra:
        prompt_index += [i for i, tree in enumerate(trees) for _ in tree.branches]

    return ProcedureBatch(
        sequences=sequences,
        behaviour_logprobs=pad_rows([row.behaviour_logprobs for row in rows], answers),
        old_logprobs=pad_rows(old.logprobs, answers),
        current_logprobs=pad_rows(current.logprobs, answers),
        entropies=pad_rows(current.entropies, answers),
        prompt_lengths=torch.tensor([len(row.prompt_ids) for row in rows], dtype=torch.long),
        rewards=torch.tensor([_reward(row) for row in rows], dtype=torch.float32),
        prompt_index=torch.tensor(prompt_index, dtype=torch.long),
        policy_version=torch.tensor([row.policy_version for row in rows], dtype=torch.long),
        branch_root=torch.tensor(row_of_root, dtype=torch.long),
        branch_position=torch.tensor(
            [len(b.trajectory.prompt_ids) + b.prefix_length - 1 for b in branches], dtype=torch.long
        ),
        branch_score=torch.tensor([b.point.score for b in branches], dtype=torch.float32),
        branch_reward=torch.tensor([_reward(b.trajectory) for b in branches], dtype=torch.float32),
        branch_row=torch.arange(len(roots), len(rows)) if branch_old is not None else None,
        num_roots=len(roots),
        temperature=temperature,
        trees=list(trees),
        fallback=torch.tensor(list(fallback), dtype=torch.bool),
        num_scored=len(rows) if num_scored is None else num_scored,
    )


def _reward(trajectory: Trajectory) -> float:
    assert trajectory.reward is not None, "score trajectories before batching them"
    return trajectory.reward
