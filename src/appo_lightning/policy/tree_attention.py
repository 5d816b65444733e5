"""Attention over sequences that begin alike: each token sees the tokens before it in its own row, and no others.

Everything in a transformer but attention treats tokens one by one, so a token that several rows share is computed once.
For attention each row gathers the keys and values of all its tokens, and the library's own kernel does the rest, in one
of two ways:

- **whole**: every token of the row asks, shared ones again, under the causal kernel: L^2 / 2 pairs, no mask;
- **added**: only the tokens that the row does not share ask, under a mask: n L pairs.

A row takes the cheaper way. No mask over a whole tree ever exists.

Axis letters: ``N`` computed tokens, ``R`` rows of a group, ``L`` padded tokens of a row, ``n`` padded tokens of a row
that ask, ``H`` heads, ``D`` head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

KERNEL = "sdpa"  # transformers' name of what computes each group
_TREE_ATTENTION = "appo_tree"  # and of what is done here
_MASK_ENTRIES = 2**26  # of all groups together; rows beyond go whole, so that masks stay small
_CALL_PAIRS = 2**13  # padding that costs about as much as one more call of the kernel
_PADDING = 0.2  # more padding than this share is worth one more call


@dataclass(slots=True)
class RowGroup:
    """Rows of similar length, which ask together."""

    keys: Tensor  # [R, L] where each token of a row is among the computed tokens; 0 on padding
    queries: Tensor  # [R, n] the same of the tokens that ask
    shared: Tensor | None  # [R] tokens of a row before the first that asks; None: all ask
    _bias: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[R, 1, n, L] what is added to the attention scores; None: the causal kernel needs none."""
        if self.shared is None:
            return None
        if dtype not in self._bias:  # the same for all layers
            asks = self.shared[:, None] + torch.arange(self.queries.shape[1], device=self.queries.device)
            future = torch.arange(self.keys.shape[1], device=self.keys.device) > asks[:, :, None]
            zeros = torch.zeros(future.shape, dtype=dtype, device=future.device)
            self._bias[dtype] = zeros.masked_fill_(future, -torch.inf)[:, None]
        return self._bias[dtype]


@dataclass(slots=True)
class RowAttention:
    """Who asks whom."""

    groups: list[RowGroup]
    source: Tensor  # [N] where the answer of each computed token is among those of all groups

    def to(self, device: torch.device) -> RowAttention:
        """On another device."""
        groups = [
            RowGroup(g.keys.to(device), g.queries.to(device), None if g.shared is None else g.shared.to(device))
            for g in self.groups
        ]
        return RowAttention(groups, self.source.to(device))


def plan_row_attention(place: np.ndarray, lengths: Sequence[int], shared: Sequence[int]) -> RowAttention:
    """Decide how each row asks, and which rows ask together.

    Args:
        place: [B, L] where each token of a row is among the computed tokens: row by row, what each does not share.
        lengths: of each row.
        shared: of each row, its first tokens that another row asks for.
    """
    rows = [row for row, length in enumerate(lengths) if length > shared[row]]
    added = _rows_that_ask_for_added(rows, lengths, shared)
    sizes, own_starts = np.array(lengths), np.array(shared)
    groups, offset = [], 0
    answers = np.zeros_like(sizes)  # of each row, where that of its first token is, or would be
    for masked in (False, True):
        chosen = [row for row in rows if (row in added) == masked]
        for members in _of_similar_length(chosen, lengths, shared if masked else [0] * len(lengths)):
            keys = queries = place[members, : lengths[members[0]]]
            number = np.arange(len(members))
            starts = own_starts[members] if masked else np.zeros_like(number)
            if masked:
                asks = (sizes[members] - starts)[:, None]
                position = np.arange(asks.max())
                inside = (starts[:, None] + position).clip(max=keys.shape[1] - 1)
                queries = np.where(position < asks, keys[number[:, None], inside], 0)
            answers[members] = offset + number * queries.shape[1] - starts
            offset += queries.size
            before = torch.from_numpy(starts) if masked else None
            groups.append(RowGroup(torch.from_numpy(keys), torch.from_numpy(queries), before))
    own = sizes - own_starts
    source = np.arange(own.sum()) + np.repeat(answers + own_starts - (own.cumsum() - own), own)
    return RowAttention(groups, torch.from_numpy(source))


def _rows_that_ask_for_added(rows: Iterable[int], lengths: Sequence[int], shared: Sequence[int]) -> set[int]:
    """Rows that share more than half: n L < L^2 / 2; those that save most first, while their masks are small."""
    chosen, entries = set(), 0
    for row in sorted(rows, key=lambda row: shared[row] / lengths[row], reverse=True):
        entries += (lengths[row] - shared[row]) * lengths[row]
        if 2 * shared[row] <= lengths[row] or entries > _MASK_ENTRIES:
            break
        chosen.add(row)
    return chosen


def _of_similar_length(rows: Iterable[int], lengths: Sequence[int], first: Sequence[int]) -> list[list[int]]:
    """Rows cut into groups, so that padding costs less than further calls would."""
    groups: list[list[int]] = []
    real = widest = 0
    for row in sorted(rows, key=lambda row: lengths[row], reverse=True):
        pairs = lengths[row] * (lengths[row] - first[row])
        if groups:
            longest, together = lengths[groups[-1][0]], real + pairs
            width = max(widest, lengths[row] - first[row])
            padding = longest * width * (len(groups[-1]) + 1) - together
            if padding <= max(_PADDING * together, _CALL_PAIRS):
                groups[-1].append(row)
                real, widest = together, width
                continue
        groups.append([row])
        real, widest = pairs, lengths[row] - first[row]
    return groups


def use_tree_attention(model: Any, *, enabled: bool) -> None:
    """Let a transformers model attend by ``tree_attention``, or by the kernel alone."""
    from transformers import AttentionInterface

    AttentionInterface.register(_TREE_ATTENTION, tree_attention)
    model.set_attn_implementation(_TREE_ATTENTION if enabled else KERNEL)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree: RowAttention | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: [1, H, N, D] of the computed tokens to [1, N, H, D].

    Without ``tree``, what the kernel does with separate rows.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as kernel

    if tree is None:
        return kernel(module, query, key, value, attention_mask, **options)
    answers = []
    for group in tree.groups:
        asking, known, values = _gather(query, group.queries), _gather(key, group.keys), _gather(value, group.keys)
        answers.append(kernel(module, asking, known, values, group.bias(query.dtype), **options)[0].flatten(0, 1))
    return torch.cat(answers).index_select(0, tree.source)[None], None


def _gather(computed: Tensor, index: Tensor) -> Tensor:
    """[1, H, N, D] at [R, L] as [R, H, L, D]."""
    by_token = computed[0].transpose(0, 1)
    return by_token.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)
