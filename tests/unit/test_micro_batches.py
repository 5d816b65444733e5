"""Micro-batches hold rows of similar length, up to a number of tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from appo_lightning.batching import padding_of, split_by_tokens


def test_rows_are_packed_longest_first_up_to_the_budget() -> None:
    lengths = torch.tensor([3, 9, 4, 8, 2, 30])
    # 30 goes alone though it is longer; 9 and 8 fill 2 * 9; then 4 * 4 would hold four rows, three are left.
    assert [rows.tolist() for rows in split_by_tokens(lengths, 18)] == [[5], [1, 3], [2, 0, 4]]


def test_padding_is_what_the_longest_row_costs_the_others() -> None:
    assert padding_of(torch.tensor([4, 3, 2])) == (0 + 1 + 2, 12)
    assert padding_of(torch.tensor([7])) == (0, 7)


def test_no_rows_make_no_micro_batches() -> None:
    assert split_by_tokens(torch.zeros(0, dtype=torch.long), 10) == []


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_every_row_goes_once_and_only_a_long_one_is_over_the_budget(lengths: list[int], budget: int) -> None:
    given_lengths = torch.tensor(lengths)
    chunks = split_by_tokens(given_lengths, budget)
    assert sorted(row for rows in chunks for row in rows.tolist()) == list(range(len(lengths)))
    for rows, following in zip(chunks, [*chunks[1:], None], strict=True):
        longest = int(given_lengths[rows].max())
        assert len(rows) * longest <= budget or len(rows) == 1
        # Greedy: one row more would not have fitted.
        assert following is None or (len(rows) + 1) * longest > budget
        assert following is None or int(given_lengths[following].max()) <= int(given_lengths[rows].min())
