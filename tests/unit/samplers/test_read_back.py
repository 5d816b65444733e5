"""Which columns of a weight are read back, and what their comparison tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from appo_lightning.samplers.read_back import ReadBack, ReadBackResult
from helpers.scripted import ScriptedSampler

WIDTH = 64


class Holding(ScriptedSampler):
    """Computes with given weights, if that were what it did."""

    def __init__(self, held: Mapping[str, Tensor]) -> None:
        super().__init__(lambda text, seed: "")
        self.held = held

    def read_weights(self, columns: Mapping[str, Sequence[int]]) -> dict[str, list[Tensor]]:
        return {
            name: [self.held[name] if self.held[name].dim() == 1 else self.held[name][:, list(chosen)]]
            for name, chosen in columns.items()
            if name in self.held
        }


def compare(
    pushed: Mapping[str, Tensor], held: Mapping[str, Tensor], push: int = 0, columns: int = 4
) -> ReadBackResult:
    read_back = ReadBack(columns, push=push)
    for _ in read_back.noting(pushed.items()):
        pass
    return read_back.compare(Holding(held))


@pytest.mark.parametrize("step", [1, 4, 5])
def test_every_column_has_its_turn(step: int) -> None:
    """However many optimiser steps lie between two pushes; 16 pushes would be the least."""
    one = torch.zeros(1, WIDTH)
    told = []
    for column in range(WIDTH):
        changed = one.clone()
        changed[0, column] = 1.0
        told.append({p for p in range(64) if compare({"w": one}, {"w": changed}, push=p * step).different})
    assert all(told)
    assert sum(map(len, told)) == 64 * 4  # columns that are read, over all pushes


@pytest.mark.parametrize("push", range(8))
@pytest.mark.parametrize("start", [0, 7, 48])
def test_a_quarter_of_the_columns_that_was_left_behind_is_told_at_once(push: int, start: int) -> None:
    old, new = torch.zeros(3, WIDTH), torch.ones(3, WIDTH)
    half_pushed = new.clone()
    half_pushed[:, start : start + WIDTH // 4] = old[:, start : start + WIDTH // 4]
    assert compare({"w": new}, {"w": half_pushed}, push).different == ["w"]


def test_one_row_and_one_bit_are_enough() -> None:
    pushed = {"w": torch.ones(3, WIDTH), "norm": torch.ones(3)}
    held = {name: tensor.clone() for name, tensor in pushed.items()}
    held["w"][1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert compare(pushed, held) == ReadBackResult(checked=2, different=["w"])
    held["norm"][2] = 2.0
    assert compare(pushed, held).different == ["w", "norm"]


def test_what_cannot_be_read_is_counted() -> None:
    pushed = {"w": torch.ones(3, WIDTH), "experts": torch.ones(2, 3, WIDTH), "norm": torch.ones(3)}
    assert compare(pushed, {"norm": torch.ones(3)}) == ReadBackResult(checked=1, unchecked=2)


def test_numbers_that_are_not_finite_are_told_apart() -> None:
    broken = {"w": torch.full((3, WIDTH), torch.nan), "norm": torch.ones(3)}
    assert compare(broken, broken) == ReadBackResult(checked=2, different=["w"], not_finite=["w"])


def test_a_coarser_sampler_holds_the_rounded_number() -> None:
    pushed = {"w": torch.rand(3, WIDTH)}
    assert compare(pushed, {"w": pushed["w"].bfloat16()}).different == []
    assert compare(pushed, {"w": pushed["w"].bfloat16() + 1}).different == ["w"]
