"""Sequences that begin alike, packed so that their common beginning is computed once.

Roots of one prompt share the prompt, prompts may share their instructions, a branch shares its root's prefix. Sorted,
each row adds to the row before it only the tokens behind their common beginning. These stand one after the other in a
**pack**, without padding; ``tree_attention`` lets each token see the tokens before it in its own row.

Axis letters: ``B`` rows, ``L`` padded tokens of a row, ``N`` tokens of a pack.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from appo_lightning.policy.tree_attention import RowAttention, plan_row_attention


@dataclass(slots=True)
class Pack:
    """Rows that are computed together."""

    rows: list[int]
    shared: list[int]  # per row, tokens that it shares with the row before it; 0 for the first
    length: int  # tokens that are computed


@dataclass(slots=True)
class TreePacking:
    """A pack as tensors, and where the tokens of the rows are."""

    token_ids: Tensor  # [1, N]
    position_ids: Tensor  # [1, N] position in the row, not in the pack
    previous: Tensor  # [N] where the token before is; 0 for the first of a row
    place: Tensor  # [B, L] where a row's token is; 0 on padding
    attention: RowAttention

    def to(self, device: torch.device) -> TreePacking:
        """On another device."""
        return TreePacking(
            self.token_ids.to(device),
            self.position_ids.to(device),
            self.previous.to(device),
            self.place.to(device),
            self.attention.to(device),
        )

    def pack(self, mask: Tensor) -> Tensor:
        """[1, N] bool, True where any row's mask [B, L] is: a token that several rows ask for is asked for once."""
        packed = torch.zeros_like(self.token_ids, dtype=torch.bool)
        packed[0, self.place[mask]] = True
        return packed

    def unpack(self, values: Tensor, mask: Tensor) -> Tensor:
        """[B, L] values of each row's tokens from those of the pack [1, N]; 0 outside the mask."""
        # Not values[0, place]: threads would add up its gradient in any order.
        return values[0].index_select(0, self.place.flatten()).view_as(self.place).masked_fill(~mask, 0.0)


def plan_packs(token_ids: Tensor, lengths: Tensor, *, budget: int) -> list[Pack]:
    """Decide which rows are computed together.

    Rows in lexicographic order fill a pack until it would have more than ``budget`` tokens; the next one then computes
    the common beginning once more.

    Args:
        token_ids: [B, L] right-padded, on the CPU.
        lengths: [B] tokens of each row.
        budget: tokens of one pack; a longer row still goes alone.
    """
    ids = token_ids.numpy()
    sizes = lengths.tolist()
    big_endian = np.ascontiguousarray(ids.astype(">i4"))  # compares like its numbers
    keys = [big_endian[row, :size].tobytes() for row, size in enumerate(sizes)]
    order = sorted(range(len(sizes)), key=keys.__getitem__)
    packs: list[Pack] = []
    for row, common in zip(order, _shared_with_previous(ids[order], lengths.numpy()[order]), strict=True):
        if packs and packs[-1].length + sizes[row] - common <= budget:
            packs[-1].rows.append(row)
            packs[-1].shared.append(common)
            packs[-1].length += sizes[row] - common
        else:
            packs.append(Pack([row], [0], sizes[row]))
    return packs


def _shared_with_previous(ids: np.ndarray, lengths: np.ndarray) -> list[int]:
    """Tokens that each row [B, L] begins with and the row before it too; 0 for the first."""
    different = ids[1:] != ids[:-1]
    first = np.where(different.any(axis=1), different.argmax(axis=1), ids.shape[1])
    return [0, *np.minimum(first, np.minimum(lengths[1:], lengths[:-1])).tolist()][: len(ids)]


def pack_tree(token_ids: Tensor, lengths: Tensor, pack: Pack) -> TreePacking:
    """Build the tensors of a pack.

    Args:
        token_ids: [B, L] its rows, in its order, on the CPU.
        lengths: [B] tokens of each row.
        pack: from ``plan_packs``.
    """
    # NumPy: its small arrays cost a fraction of torch's.
    rows, sizes, shared = token_ids.numpy(), lengths.numpy(), np.array(pack.shared)
    added = sizes - shared
    starts = added.cumsum() - added  # where the tokens that a row adds begin in the pack
    number = np.arange(pack.length)
    positions = number + np.repeat(shared - starts, added)
    of_row = np.repeat(np.arange(len(rows)), added)
    place = np.zeros(rows.shape, dtype=np.int64)
    place[of_row, positions] = number
    for row, common in enumerate(pack.shared):
        if common:
            place[row, :common] = place[row - 1, :common]
    previous = number - 1
    first = np.where(shared, place[np.arange(len(rows)), shared - 1], 0)
    previous[starts[added > 0]] = first[added > 0]
    return TreePacking(
        torch.from_numpy(rows[of_row, positions])[None],
        torch.from_numpy(positions)[None],
        torch.from_numpy(previous),
        torch.from_numpy(place),
        plan_row_attention(place, sizes.tolist(), pack.shared),
    )
