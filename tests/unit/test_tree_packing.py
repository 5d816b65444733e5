"""Packed sequences are scored as the sequences alone, and a common beginning is computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from appo_lightning.errors import ConfigurationError
from appo_lightning.policy.causal_lm import CausalPolicy
from appo_lightning.policy.options import LoraOptions, PolicyOptions
from appo_lightning.policy.tree_packing import TreePacking, pack_trees, plan_packs
from helpers.tiny import perturb, save_tiny


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("policy")
    save_tiny(directory)
    return str(directory)


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) for row in rows])


def packed(rows: list[list[int]], groups: list[int], budget: int) -> tuple[list[int], TreePacking]:
    """Row numbers in the order of the packs, and the packing of these rows."""
    packs = plan_packs(*padded(rows), torch.tensor(groups), budget=budget)
    order = [row for pack in packs for row in pack.rows]
    return order, pack_trees(*padded([rows[row] for row in order]), packs)


def test_a_tree_is_laid_out_segment_by_segment() -> None:
    # Roots 7 8 1 2 and 7 8 3; the branch 7 8 1 4 leaves the first root after its third token.
    order, packing = packed([[7, 8, 1, 2], [7, 8, 3], [7, 8, 1, 4]], [0, 0, 0], budget=20)
    assert order == [0, 2, 1]
    assert packing.token_ids.tolist() == [[7, 8, 1, 2, 4, 3]]
    assert packing.position_ids.tolist() == [[0, 1, 2, 3, 3, 2]]
    assert packing.previous.tolist() == [[0, 0, 1, 2, 2, 1]]
    assert packing.place.tolist() == [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5, 0]]
    assert packing.visible()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_the_budget_cuts_a_tree_and_the_beginning_is_computed_again() -> None:
    rows = [[1, 2, 3, n] for n in range(5, 10)]
    packs = plan_packs(*padded(rows), torch.zeros(5), budget=6)
    assert [(pack.rows, pack.shared, pack.length) for pack in packs] == [
        ([0, 1, 2], [0, 3, 3], 6),
        ([3, 4], [0, 3], 5),
    ]
    assert [pack.length for pack in plan_packs(*padded(rows), torch.zeros(5), budget=1)] == [4] * 5


def test_rows_of_two_prompts_or_without_a_common_beginning_stay_apart() -> None:
    rows = [[1, 2, 3], [1, 2, 4]]
    assert len(plan_packs(*padded(rows), torch.tensor([0, 1]), budget=99)) == 2
    rows = [[1, 2, 3], [2, 2, 3]]
    assert len(plan_packs(*padded(rows), torch.tensor([0, 0]), budget=99)) == 2


def test_an_equal_row_and_one_that_is_a_beginning_cost_nothing() -> None:
    order, packing = packed([[1, 2, 3], [1, 2], [1, 2, 3]], [0, 0, 0], budget=99)
    assert order == [1, 0, 2]
    assert packing.token_ids.tolist() == [[1, 2, 3]]
    assert packing.place.tolist() == [[0, 1, 0], [0, 1, 2], [0, 1, 2]]


ROWS = st.lists(st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=8), st.integers(0, 2)), min_size=1)


@settings(deadline=None)
@given(ROWS, st.integers(1, 40))
def test_every_token_sees_the_tokens_before_it_in_its_row_and_no_others(rows_and_groups, budget) -> None:
    rows, groups = [list(row) for row, _ in rows_and_groups], [group for _, group in rows_and_groups]
    order, packing = packed(rows, groups, budget)
    assert sorted(order) == list(range(len(rows)))
    visible, (_, width) = packing.visible()[:, 0], packing.token_ids.shape
    assert width <= max(budget, *map(len, rows))
    for i, row in enumerate(order):
        place = packing.place[i, : len(rows[row])].tolist()
        pack, columns = place[0] // width, [p % width for p in place]
        assert all(p // width == pack for p in place)
        assert packing.token_ids[pack, columns].tolist() == rows[row]
        assert packing.position_ids[pack, columns].tolist() == list(range(len(columns)))
        assert packing.previous[pack, columns].tolist() == [0, *columns[:-1]]
        for t, column in enumerate(columns):
            assert visible[pack, column].nonzero()[:, 0].tolist() == sorted(columns[: t + 1])


def test_values_come_back_to_every_row_and_a_shared_token_is_asked_for_once() -> None:
    _, packing = packed([[7, 8, 1, 2], [7, 8, 3], [7, 8, 1, 4]], [0, 0, 0], budget=20)
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 0]], dtype=torch.bool)  # rows 0, 2, 1
    assert packing.pack(mask).int().tolist() == [[0, 1, 1, 1, 1, 0]]
    values = torch.tensor([[10.0, 11.0, 12.0, 13.0, 14.0, 15.0]])
    assert packing.unpack(values, mask).tolist() == [[0, 11, 12, 13], [0, 0, 12, 14], [0, 11, 0, 0]]


# --- the policy ------------------------------------------------------------------------------------------------------


def tree() -> tuple[list[list[int]], list[int], Tensor]:
    """Two prompts with roots and branches of them, groups, and a mask over rows [B, L]."""
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return torch.randint(5, 300, (count,), generator=generator).tolist()

    rows, groups, starts = [], [], []
    for prompt in range(2):
        start = some(9 + prompt)
        roots = [start + some(count) for count in (7, 4, 6)]
        branches = [roots[0][: len(start) + 3] + some(5), roots[2][: len(start) + 1] + some(2)]
        rows += roots + branches
        groups += [prompt] * 5
        starts += [len(start)] * 3 + [len(start) + 3, len(start) + 1]
    ids, lengths = padded(rows)
    positions = torch.arange(ids.shape[1])[None]
    mask = (positions >= torch.tensor(starts)[:, None]) & (positions < lengths[:, None])
    mask[0, starts[0] + 2] = False  # a hole, as a tool result makes
    return rows, groups, mask


@pytest.mark.parametrize("budget", [30, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_implementation": "eager"},
        {"lora": LoraOptions(rank=4)},
        {"gradient_checkpointing": True},
        {"logit_chunk": 3},
    ],
    ids=str,
)
def test_logprobs_entropies_and_gradients_are_those_of_separate_sequences(path, options, budget) -> None:
    policy = CausalPolicy(PolicyOptions(path, **options)).train()
    if policy.options.lora:
        perturb(policy, seed=3)
    policy.require_tree_attention()
    assert policy.training
    rows, groups, mask = tree()
    order, packing = packed(rows, groups, budget)
    ids, lengths = padded([rows[row] for row in order])
    mask = mask[order]
    weight = torch.randn(ids.shape, generator=torch.Generator().manual_seed(1))
    assert packing.token_ids.numel() < ids.numel()

    def run(packing: TreePacking | None) -> tuple[Tensor, dict[str, Tensor]]:
        policy.zero_grad()
        scored = policy.score(ids, lengths, mask=mask, temperature=0.7, packing=packing)
        (scored.logprobs * weight).sum().backward()
        return scored.logprobs.detach(), {name: p.grad.clone() for name, p in policy.trainable() if p.grad is not None}

    (ours, our_gradients), (theirs, their_gradients) = run(packing), run(None)
    assert ours.shape == ids.shape
    assert torch.equal(ours != 0, mask)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert our_gradients.keys() == their_gradients.keys() != set()
    for name, gradient in their_gradients.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-5 * scale, rtol=0, msg=name)
    with torch.no_grad():
        entropies = [policy.score(ids, lengths, mask=mask, entropy=True, packing=p).entropies for p in (packing, None)]
    torch.testing.assert_close(entropies[0], entropies[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_precision_takes_the_mask_too(path, dtype) -> None:
    policy = CausalPolicy(PolicyOptions(path, dtype=dtype)).eval()
    policy.require_tree_attention()
    rows, groups, mask = tree()
    order, packing = packed(rows, groups, 1000)
    ids, lengths = padded([rows[row] for row in order])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (policy.score(ids, lengths, mask=mask[order], packing=p).logprobs for p in (packing, None))
    assert float((ours - theirs).abs().mean()) < 0.1  # bfloat16 keeps eight bits of logits of some ten nats


def use_flash_attention(policy: Any) -> None:
    policy.options.attn_implementation = "flash_attention_2"


def slide(policy: Any) -> None:
    policy._causal_lm.config.layer_types = ["full_attention", "sliding_attention"]


def slide_everywhere(policy: Any) -> None:
    policy._causal_lm.config.layer_types = None
    policy._causal_lm.config.sliding_window = 4


def ignore_the_mask(policy: Any) -> None:
    object.__setattr__(policy, "_tree_attention", lambda packing: {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (use_flash_attention, "runs with policy.attn_implementation: flash_attention_2; use sdpa"),
        (slide, "has layers of sliding_attention; set model.shared_prefixes: false"),
        (slide_everywhere, "has layers of sliding_attention; set model.shared_prefixes: false"),
        (ignore_the_mask, r"scores packed tokens .* nats off; set model.shared_prefixes: false"),
    ],
)
def test_a_model_that_cannot_is_refused_in_one_line(path, change, message) -> None:
    policy = CausalPolicy(PolicyOptions(path))
    change(policy)
    with pytest.raises(ConfigurationError, match=message) as raised:
        policy.require_tree_attention()
    assert str(raised.value).startswith("model.shared_prefixes needs attention under a mask of one's own, but ")
    assert "\n" not in str(raised.value)
