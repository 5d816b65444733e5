"""Proof that a weight push arrived: noted as weights leave, read back from what the sampler computes with."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from appo_lightning.samplers.base import Sampler


@dataclass(slots=True)
class ReadBackResult:
    """What a sampler holds, compared with what was pushed."""

    checked: int  # weights that were read back
    unchecked: int  # weights that the sampler could not read
    different: list[str] = field(default_factory=list)  # names of weights that are not what was pushed


class ReadBack:
    """Notes some columns of each weight on its way into a sampler, and compares them bit by bit afterwards.

    An optimiser step moves nearly every number of a weight, by however little, so a few columns tell a weight that was
    left behind. They are others at every push.

    Args:
        columns: of each matrix; vectors are compared whole.
        seed: chooses them.
    """

    def __init__(self, columns: int, *, seed: int) -> None:
        self._places = [random.Random(f"{seed} {i}").random() for i in range(columns)]
        self._noted: dict[str, Tensor] = {}
        self._columns: dict[str, list[int]] = {}
        self._unnoted = 0

    def noting(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Pass weights on, with a note of each."""
        for name, tensor in weights:
            if tensor.dim() == 1:
                self._columns[name], self._noted[name] = [], tensor.detach().clone()
            elif tensor.dim() == 2:
                chosen = sorted({int(place * tensor.shape[1]) for place in self._places})
                self._columns[name], self._noted[name] = chosen, tensor.detach()[:, chosen]
            else:
                self._unnoted += 1
            yield name, tensor

    def compare(self, sampler: Sampler) -> ReadBackResult:
        """Read the noted weights from a sampler."""
        found = sampler.read_weights(self._columns)
        different = [
            name for name, parts in found.items() if not all(_equal(self._noted[name], part) for part in parts)
        ]
        return ReadBackResult(len(found), len(self._noted) - len(found) + self._unnoted, different)


def _equal(pushed: Tensor, held: Tensor) -> bool:
    # A sampler of another precision holds the rounded number.
    return torch.equal(pushed.to(held.device, held.dtype), held)
