"""Proof that a weight push arrived: noted as weights leave, read back from what the sampler computes with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from appo_lightning.samplers.base import Sampler

# Multiples of it, modulo 1, fill every gap: the largest shrinks like 1 / n from the first to the last of n.
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(slots=True)
class ReadBackResult:
    """What a sampler holds, compared with what was pushed."""

    checked: int = 0  # weights that were read back
    unchecked: int = 0  # weights that the sampler could not read
    different: list[str] = field(default_factory=list)  # names of weights that are not what was pushed
    not_finite: list[str] = field(default_factory=list)  # those of them that hold NaN or infinite numbers


class ReadBack:
    """Notes some columns of each weight on its way into a sampler, and compares them bit by bit afterwards.

    An optimiser step moves nearly every number of a weight, by however little, so a few columns tell a weight that was
    left behind. They are spread evenly, so that of a matrix in which only a stretch of columns was left behind, one of
    ``1 / columns`` of its width or more is told as well; and they move on with each push, so that all have their turn.

    Args:
        columns: of each matrix; vectors are compared whole.
        push: number of the push: columns of successive numbers fill each other's gaps.
    """

    def __init__(self, columns: int, *, push: int) -> None:
        shift = push * _GOLDEN % 1
        self._places = [(i + shift) / columns for i in range(columns)]  # as shares of the width
        self._noted: dict[str, Tensor] = {}
        self._columns: dict[str, list[int]] = {}
        self._chosen: dict[tuple[int, torch.device], tuple[list[int], Tensor]] = {}
        self._unnoted = 0

    def noting(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass weights on, with a note of each."""
        for name, tensor in weights:
            if tensor.dim() == 1:
                self._columns[name], self._noted[name] = [], tensor.detach().clone()
            elif tensor.dim() == 2:
                chosen, index = self._choose(tensor.shape[1], tensor.device)
                self._columns[name], self._noted[name] = chosen, tensor.detach().index_select(1, index)
            else:
                self._unnoted += 1
            yield name, tensor

    def _choose(self, width: int, device: torch.device) -> tuple[list[int], Tensor]:
        """The columns of a matrix; most have one of a few widths."""
        if (width, device) not in self._chosen:
            chosen = sorted({int(place * width) for place in self._places})
            self._chosen[width, device] = chosen, torch.tensor(chosen, dtype=torch.long, device=device)
        return self._chosen[width, device]

    @contextmanager
    def comparing(self, sampler: Sampler) -> Iterator[ReadBackResult]:
        """Read the noted weights from a sampler while it samples.

        Yields:
            The result; empty until the end of the block.
        """
        result = ReadBackResult()
        with sampler.reading(self._columns) as held:
            yield result
        result.checked = len(held)
        result.unchecked = len(self._noted) - len(held) + self._unnoted
        for name, parts in held.items():
            if not all(_equal(self._noted[name], part) for part in parts):
                result.different.append(name)
                if not all(part.isfinite().all() for part in (self._noted[name], *parts)):
                    result.not_finite.append(name)

    def compare(self, sampler: Sampler) -> ReadBackResult:
        """Read the noted weights from a sampler."""
        with self.comparing(sampler) as result:
            pass
        return result


def _equal(pushed: Tensor, held: Tensor) -> bool:
    # A sampler of another precision holds the rounded number.
    return torch.equal(pushed.to(held.device, held.dtype), held)
