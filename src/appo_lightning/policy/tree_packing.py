"""Sequences that begin alike, packed so that their common beginning is computed once.

Roots of one prompt share the prompt; a branch shares its root's prefix. Sorted, each row adds to the row before it only
the tokens behind their common beginning. These segments stand one after the other in a **pack**; a token sees the
tokens before it in its own row and no others, so its hidden state is that of the row alone.

Axis letters: ``B`` rows, ``L`` padded tokens of a row, ``G`` packs, ``N`` padded tokens of a pack, ``S`` segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class Pack:
    """Rows that are computed together."""

    rows: list[int]
    shared: list[int]  # per row, tokens that it shares with the row before it; 0 for the first
    length: int  # tokens of all segments


@dataclass(slots=True)
class TreePacking:
    """Packs as tensors, and where the tokens of the rows are."""

    token_ids: Tensor  # [G, N] right-padded
    position_ids: Tensor  # [G, N] position in the row, not in the pack
    previous: Tensor  # [G, N] column of the token before; 0 for the first
    segment: Tensor  # [G, N]; S - 1 on padding
    limit: Tensor  # [G, S, S] int32: a token of segment i sees the tokens of segment j at positions below limit[i, j]
    place: Tensor  # [B, L] where a row's token is in the flattened packs; 0 on padding

    def to(self, device: torch.device) -> TreePacking:
        """On another device."""
        return TreePacking(*(getattr(self, field.name).to(device) for field in fields(self)))

    def visible(self) -> Tensor:
        """[G, 1, N, N] bool, True where a token (third axis) sees another (fourth)."""
        by_segment = self.limit.gather(2, self.segment[:, None, :].expand(-1, self.limit.shape[1], -1))  # [G, S, N]
        seen = by_segment > self.position_ids[:, None, :].int()
        visible = seen.gather(1, self.segment[:, :, None].expand(-1, -1, seen.shape[2]))  # [G, N, N]
        visible &= self.position_ids[:, None, :] <= self.position_ids[:, :, None]
        # Padding sees itself: attention over nothing is NaN.
        visible.diagonal(dim1=1, dim2=2).fill_(True)
        return visible[:, None]

    def pack(self, mask: Tensor) -> Tensor:
        """[G, N] bool, True where any row's mask [B, L] is: a token that several rows ask for is asked for once."""
        packed = torch.zeros(self.token_ids.numel(), dtype=torch.bool, device=mask.device)
        packed[self.place[mask]] = True
        return packed.view_as(self.token_ids)

    def unpack(self, values: Tensor, mask: Tensor) -> Tensor:
        """[B, L] values of each row's tokens from those of the packs [G, N]; 0 outside the mask."""
        return values.flatten()[self.place].masked_fill(~mask, 0.0)


def plan_packs(token_ids: Tensor, lengths: Tensor, groups: Tensor, *, budget: int) -> list[Pack]:
    """Decide which rows are computed together.

    Rows of one group, in lexicographic order, fill a pack until it would have more than ``budget`` tokens; the next one
    then computes the common beginning once more. Rows that share nothing go into packs of their own.

    Args:
        token_ids: [B, L] right-padded, on the CPU.
        lengths: [B] tokens of each row.
        groups: [B] rows of different groups are never packed together, though they may begin alike: attention over a
            pack grows with the square of its length.
        budget: tokens of one pack; a longer row still goes alone.
    """
    ids = token_ids.numpy()
    sizes, of_group = lengths.tolist(), groups.tolist()
    big_endian = np.ascontiguousarray(ids.astype(">i4"))  # compares like its numbers
    keys = [big_endian[row, :size].tobytes() for row, size in enumerate(sizes)]
    packs: list[Pack] = []
    for row in sorted(range(len(sizes)), key=lambda row: (of_group[row], keys[row])):
        size = sizes[row]
        if packs and of_group[packs[-1].rows[-1]] == of_group[row]:
            pack = packs[-1]
            last = pack.rows[-1]
            shared = _common_beginning(ids[last, : sizes[last]], ids[row, :size])
            if shared and pack.length + size - shared <= budget:
                pack.rows.append(row)
                pack.shared.append(shared)
                pack.length += size - shared
                continue
        packs.append(Pack([row], [0], size))
    return packs


def _common_beginning(one: np.ndarray, other: np.ndarray) -> int:
    width = min(len(one), len(other))
    different = one[:width] != other[:width]
    return int(different.argmax()) if different.any() else width


def pack_trees(token_ids: Tensor, lengths: Tensor, packs: Sequence[Pack]) -> TreePacking:
    """Build the tensors of some packs.

    Args:
        token_ids: [B, L] the rows of the packs, in their order: those of the first pack, then those of the second.
        lengths: [B] tokens of each row.
        packs: at least one.
    """
    width = max(pack.length for pack in packs)
    num_segments = max(len(pack.rows) for pack in packs) + 1  # the last is padding: it sees nothing, nothing sees it
    ids, positions, previous = (torch.zeros((len(packs), width), dtype=torch.long) for _ in range(3))
    segment = torch.full((len(packs), width), num_segments - 1)
    limit = torch.zeros((len(packs), num_segments, num_segments), dtype=torch.int32)
    place = torch.zeros(token_ids.shape, dtype=torch.long)
    sizes = lengths.tolist()
    row = 0
    for g, pack in enumerate(packs):
        stop = 0
        for i, shared in enumerate(pack.shared):
            size = sizes[row]
            start, stop = stop, stop + size - shared
            place[row, :shared] = place[row - 1, :shared]
            place[row, shared:size] = torch.arange(start, stop) + g * width
            ids[g, start:stop] = token_ids[row, shared:size]
            positions[g, start:stop] = torch.arange(shared, size)
            previous[g, start:stop] = place[row, shared - 1 : size - 1] - g * width if shared else _before(size)
            segment[g, start:stop] = i
            if i:
                limit[g, i, :i] = limit[g, i - 1, :i].clamp(max=shared)
            limit[g, i, i] = size
            row += 1
    return TreePacking(ids, positions, previous, segment, limit, place)


def _before(size: int) -> Tensor:
    return (torch.arange(size) - 1).clamp(min=0)
