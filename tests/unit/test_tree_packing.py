"""Packed sequences are scored as the sequences alone, and a common beginning is computed once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from appo_lightning.errors import ConfigurationError
from appo_lightning.policy import tree_attention
from appo_lightning.policy.causal_lm import CausalPolicy
from appo_lightning.policy.options import LoraOptions, PolicyOptions
from appo_lightning.policy.tree_attention import RowAttention, plan_row_attention
from appo_lightning.policy.tree_packing import TreePacking, pack_tree, plan_packs
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


def packed(rows: list[list[int]], budget: int) -> list[tuple[list[int], TreePacking]]:
    """Row numbers in the order of each pack, and the packing of these rows."""
    packs = plan_packs(*padded(rows), budget=budget)
    return [(pack.rows, pack_tree(*padded([rows[row] for row in pack.rows]), pack)) for pack in packs]


def seen(attention: RowAttention) -> list[list[int]]:
    """What each computed token sees, sorted."""
    answers: list[list[int]] = []
    for group in attention.groups:
        bias = group.bias(torch.float32)
        for index, (keys, queries) in enumerate(zip(group.keys.tolist(), group.queries.tolist(), strict=True)):
            for t in range(len(queries)):
                visible = range(t + 1) if bias is None else (bias[index, 0, t] == 0).nonzero()[:, 0].tolist()
                answers.append(sorted(keys[k] for k in visible))
    return [answers[place] for place in attention.source.tolist()]


def test_a_tree_is_laid_out_row_by_row() -> None:
    # Roots 7 8 1 2 and 7 8 3; the branch 7 8 1 4 leaves the first root after its third token.
    ((order, packing),) = packed([[7, 8, 1, 2], [7, 8, 3], [7, 8, 1, 4]], budget=20)
    assert order == [0, 2, 1]
    assert packing.token_ids.tolist() == [[7, 8, 1, 2, 4, 3]]
    assert packing.position_ids.tolist() == [[0, 1, 2, 3, 3, 2]]
    assert packing.previous.tolist() == [0, 0, 1, 2, 2, 1]
    assert packing.place.tolist() == [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5, 0]]
    assert seen(packing.attention) == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5]]


def test_a_row_that_shares_more_than_half_asks_for_the_rest_alone() -> None:
    # Ten tokens, of which a second row shares 5 and a third 6: 4 * 10 < 10 * 10 / 2 pairs.
    first, half, more = list(range(10)), [*range(5), *range(10, 15)], [*range(6), *range(15, 19)]
    place = np.array([first, half, more])
    whole, added = plan_row_attention(place, [10] * 3, [0, 5, 6]).groups
    assert whole.queries.tolist() == whole.keys.tolist() == [first, half]
    assert whole.bias(torch.float32) is None
    assert (added.queries.tolist(), added.keys.tolist()) == ([[15, 16, 17, 18]], [more])
    future = added.bias(torch.float32) == -torch.inf
    # The first that asks is at position 6: it sees seven tokens, the next eight.
    assert future[0, 0].sum(1).tolist() == [3, 2, 1, 0]


def test_masks_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_attention, "_MASK_ENTRIES", 50)
    place = np.array([list(range(10)), [*range(7), 10, 11, 12], [*range(6), *range(13, 17)]])
    # 3 * 10 entries fit, 4 * 10 more do not: the row that saves less asks whole.
    whole, added = plan_row_attention(place, [10] * 3, [0, 7, 6]).groups
    assert whole.keys.tolist() == place[[0, 2]].tolist()
    assert added.queries.tolist() == [[10, 11, 12]]


def test_rows_of_different_length_ask_in_different_calls_where_padding_would_cost_more() -> None:
    lengths = [200, 190, 20, 10]
    place = torch.arange(420).split(lengths)
    padded_place = torch.nn.utils.rnn.pad_sequence(place, batch_first=True).numpy()
    groups = plan_row_attention(padded_place, lengths, [0] * 4).groups
    # 200 and 190 waste 3,900 of 80,000 pairs; a row of 20 beside them 39,600.
    assert [tuple(group.keys.shape) for group in groups] == [(2, 200), (2, 20)]


def test_the_budget_cuts_a_tree_and_the_beginning_is_computed_again() -> None:
    rows = [[1, 2, 3, n] for n in range(5, 10)]
    packs = plan_packs(*padded(rows), budget=6)
    assert [(pack.rows, pack.shared, pack.length) for pack in packs] == [
        ([0, 1, 2], [0, 3, 3], 6),
        ([3, 4], [0, 3], 5),
    ]
    assert [pack.length for pack in plan_packs(*padded(rows), budget=1)] == [4] * 5


def test_no_rows_are_no_packs() -> None:
    assert plan_packs(torch.zeros((0, 1), dtype=torch.long), torch.zeros(0, dtype=torch.long), budget=9) == []


def test_prompts_share_what_they_begin_with_too() -> None:
    (pack,) = plan_packs(*padded([[1, 2, 3], [9, 9], [1, 2, 4]]), budget=99)
    assert (pack.rows, pack.shared, pack.length) == ([0, 2, 1], [0, 2, 0], 6)


def test_an_equal_row_and_one_that_is_a_beginning_cost_nothing() -> None:
    ((order, packing),) = packed([[1, 2, 3], [1, 2], [1, 2, 3]], budget=99)
    assert order == [1, 0, 2]
    assert packing.token_ids.tolist() == [[1, 2, 3]]
    assert packing.place.tolist() == [[0, 1, 0], [0, 1, 2], [0, 1, 2]]
    assert seen(packing.attention) == [[0], [0, 1], [0, 1, 2]]


ROWS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=8), min_size=1)


@settings(deadline=None)
@given(ROWS, st.integers(1, 40))
def test_every_token_sees_the_tokens_before_it_in_its_row_and_no_others(rows, budget) -> None:
    packs = packed(rows, budget)
    assert sorted(row for order, _ in packs for row in order) == list(range(len(rows)))
    for order, packing in packs:
        assert packing.token_ids.numel() <= max(budget, *map(len, rows))
        visible = seen(packing.attention)
        for i, row in enumerate(order):
            place = packing.place[i, : len(rows[row])].tolist()
            assert packing.token_ids[0, place].tolist() == rows[row]
            assert packing.position_ids[0, place].tolist() == list(range(len(place)))
            assert packing.previous[place[1:]].tolist() == place[:-1]
            for t, where in enumerate(place):
                assert visible[where] == sorted(place[: t + 1])


def test_values_come_back_to_every_row_and_a_shared_token_is_asked_for_once() -> None:
    ((_, packing),) = packed([[7, 8, 1, 2], [7, 8, 3], [7, 8, 1, 4]], budget=20)
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 0, 0]], dtype=torch.bool)  # rows 0, 2, 1
    assert packing.pack(mask).int().tolist() == [[0, 1, 1, 1, 1, 0]]
    values = torch.tensor([[10.0, 11.0, 12.0, 13.0, 14.0, 15.0]])
    assert packing.unpack(values, mask).tolist() == [[0, 11, 12, 13], [0, 0, 12, 14], [0, 11, 0, 0]]


# --- the policy ------------------------------------------------------------------------------------------------------


def tree() -> tuple[list[list[int]], Tensor]:
    """Two prompts that begin alike, with roots and branches of them, and a mask over rows [B, L]."""
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return torch.randint(5, 300, (count,), generator=generator).tolist()

    rows, starts = [], []
    instructions = some(4)
    for prompt in range(2):
        start = instructions + some(5 + prompt)
        roots = [start + some(count) for count in (7, 4, 6)]
        branches = [roots[0][: len(start) + 3] + some(5), roots[2][: len(start) + 1] + some(2)]
        rows += roots + branches
        starts += [len(start)] * 3 + [len(start) + 3, len(start) + 1]
    ids, lengths = padded(rows)
    positions = torch.arange(ids.shape[1])[None]
    mask = (positions >= torch.tensor(starts)[:, None]) & (positions < lengths[:, None])
    mask[0, starts[0] + 2] = False  # a hole, as a tool result makes
    return rows, mask


@pytest.mark.parametrize("budget", [30, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {},
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
    rows, mask = tree()
    weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    packs = [(torch.tensor(order), packing) for order, packing in packed(rows, budget)]
    assert (len(packs) == 1) == (budget == 1000)
    ids, lengths = padded(rows)

    def run(order: Tensor, packing: TreePacking | None) -> Tensor:
        width = int(lengths[order].max())
        part = ids[order, :width], lengths[order]
        scored = policy.score(*part, mask=mask[order, :width], temperature=0.7, packing=packing)
        (scored.logprobs * weight[order, :width]).sum().backward()
        with torch.no_grad():
            entropies = policy.score(*part, mask=mask[order, :width], entropy=True, packing=packing).entropies
        out = torch.zeros(2, len(rows), ids.shape[1])
        out[:, order, :width] = torch.stack((scored.logprobs.detach(), entropies))
        return out

    def gradients() -> dict[str, Tensor]:
        found = {name: p.grad.clone() for name, p in policy.trainable() if p.grad is not None}
        policy.zero_grad()
        return found

    theirs, their_gradients = run(torch.arange(len(rows)), None), gradients()
    policy.share_prefixes()
    assert policy.training
    ours, our_gradients = sum(run(*pack) for pack in packs), gradients()
    again, again_gradients = run(torch.arange(len(rows)), None), gradients()
    assert torch.equal(ours[0] != 0, mask)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert torch.equal(again, theirs)  # a policy that can share computes sequences alone as ever
    assert our_gradients.keys() == their_gradients.keys() != set()
    for name, gradient in their_gradients.items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(our_gradients[name], gradient, atol=1e-5 * scale, rtol=0, msg=name)
        assert torch.equal(again_gradients[name], gradient), name


def test_a_long_tree_whose_rows_ask_in_both_ways(path) -> None:
    policy = CausalPolicy(PolicyOptions(path)).train()
    policy.share_prefixes()
    generator = torch.Generator().manual_seed(0)
    prompt, *responses = torch.randint(5, 300, (5, 60), generator=generator).tolist()
    rows = [prompt + response[: 10 + 16 * n] for n, response in enumerate(responses)]
    rows += [rows[3] + prompt, rows[3][:100] + prompt[:20]]
    ((order, packing),) = packed(rows, 1000)
    assert len({group.shared is None for group in packing.attention.groups}) == 2
    ids, lengths = padded([rows[row] for row in order])
    with torch.no_grad():
        ours, theirs = (policy.score(ids, lengths, packing=p).logprobs for p in (packing, None))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_precision_shares_too(path, dtype) -> None:
    policy = CausalPolicy(PolicyOptions(path, dtype=dtype)).eval()
    policy.share_prefixes()
    rows, mask = tree()
    ((order, packing),) = packed(rows, 1000)
    ids, lengths = padded([rows[row] for row in order])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (policy.score(ids, lengths, mask=mask[order], packing=p).logprobs for p in (packing, None))
    assert float((ours - theirs).abs().mean()) < 0.1  # bfloat16 keeps eight bits of logits of some ten nats


def test_no_gradient_is_added_up_by_threads_in_any_order(path) -> None:
    # The gradient of values[index] is, with several threads and an index that repeats: torch adds it up with atomics.
    rows = [[7, 8, 1, 2], [7, 8, 3], [7, 8, 1, 4]]
    ((order, packing),) = packed(rows, budget=20)
    token_ids, lengths = padded([rows[row] for row in order])
    policy = CausalPolicy(PolicyOptions(path))
    policy.share_prefixes()
    found, ahead = set(), [policy.score(token_ids, lengths, packing=packing).logprobs.sum().grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in found:
            found.add(node)
            ahead += [before for before, _ in node.next_functions]
    names = {node.name() for node in found}
    assert "IndexSelectBackward0" in names
    assert "IndexBackward0" not in names


def test_packs_are_planned_on_the_cpu_whatever_the_default_device(path) -> None:
    """Lightning builds the policy with the GPU as default device."""
    policy = CausalPolicy(PolicyOptions(path))
    with torch.device("meta"):
        policy.share_prefixes()


def use_flash_attention(policy: Any) -> None:
    policy.options.attn_implementation = "flash_attention_2"


def slide(policy: Any) -> None:
    policy._causal_lm.config.layer_types = ["full_attention", "sliding_attention"]


def slide_everywhere(policy: Any) -> None:
    policy._causal_lm.config.layer_types = None
    policy._causal_lm.config.sliding_window = 4


def keep_ones_own_attention(policy: Any) -> None:
    policy._causal_lm.set_attn_implementation = lambda name: None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (use_flash_attention, "runs with policy.attn_implementation: flash_attention_2; use sdpa"),
        (slide, "has layers of sliding_attention; set model.shared_prefixes: false"),
        (slide_everywhere, "has layers of sliding_attention; set model.shared_prefixes: false"),
        (keep_ones_own_attention, r"scores packed tokens .* nats off; set model.shared_prefixes: false"),
    ],
)
def test_a_model_that_cannot_is_refused_in_one_line(path, change, message) -> None:
    policy = CausalPolicy(PolicyOptions(path))
    change(policy)
    with pytest.raises(ConfigurationError, match=message) as raised:
        policy.share_prefixes()
    assert str(raised.value).startswith("model.shared_prefixes needs attention to all earlier tokens, but ")
    assert "\n" not in str(raised.value)
