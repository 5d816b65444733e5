import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from appo_lightning.algorithm import (
    branch_candidates,
    branching_score,
    future_value,
    select_branch_points,
    share_branches,
)
from appo_lightning.types import BranchPoint


def ones(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def random_roots(seed, roots=4, tokens=12):
    generator = torch.Generator().manual_seed(seed)
    entropy = torch.rand(roots, tokens, generator=generator)
    gain = 0.1 * torch.randn(roots, tokens, generator=generator)
    mask = torch.rand(roots, tokens, generator=generator) < 0.8
    return entropy, gain, mask


def select(score, candidates=None, prompts=None, *, z=None, **options):
    candidates = ones(*score.shape) if candidates is None else candidates
    prompts = torch.arange(len(score)) if prompts is None else torch.tensor(prompts)
    z = torch.ones_like(score) if z is None else z
    return select_branch_points(score, z, z, candidates, prompts, **options)


def places(points):
    return [(point.root, point.position) for point in points]


def test_future_value_counts_distance_over_tool_tokens():
    log2 = torch.tensor(2.0).log().item()
    log_ratio = torch.tensor([[0.0, 5.0, log2]])
    # The tool token adds nothing but its distance: 0.5^2 log 2, 0.5 log 2, log 2 -> 2^(1/4), 2^(1/2), 2
    value = future_value(log_ratio, torch.tensor([[True, False, True]]), gamma=0.5, clip=0.0)
    torch.testing.assert_close(value, torch.tensor([[2**0.25, 2**0.5, 2.0]]))


def test_future_value_is_clipped_around_one():
    value = future_value(torch.tensor([[-3.0, 6.0]]), ones(1, 2), gamma=1.0, clip=0.2)
    # exp(-3 + 6) and exp(6) -> 1.2, 1.2; exp(-9 + 6) and exp(6) -> 0.8, 1.2
    torch.testing.assert_close(value, torch.tensor([[1.2, 1.2]]))
    value = future_value(torch.tensor([[-9.0, 6.0]]), ones(1, 2), gamma=1.0, clip=0.2)
    torch.testing.assert_close(value, torch.tensor([[0.8, 1.2]]))


def test_future_value_stays_finite():
    value = future_value(torch.full((1, 1000), 50.0), ones(1, 1000), gamma=1.0, clip=0.0)
    assert torch.isfinite(value).all()


def test_branching_score_is_the_product_of_the_z_scores():
    entropy = torch.tensor([[1.0, 3.0]])
    # Future values: exp(-1 + 1) = 1, and exp(1) -> 1.2. z(H) = -1, 1; z(Omega) = -1, 1; both products 1.
    scored = branching_score(entropy, torch.tensor([[-1.0, 1.0]]), ones(1, 2), gamma=1.0, clip=0.2)
    torch.testing.assert_close(scored.entropy_z, torch.tensor([[-1.0, 1.0]]), rtol=0, atol=1e-4)
    torch.testing.assert_close(scored.future_value_z, torch.tensor([[-1.0, 1.0]]), rtol=0, atol=1e-4)
    torch.testing.assert_close(scored.score, torch.tensor([[1.0, 1.0]]), rtol=0, atol=1e-4)


def test_a_product_of_two_negatives_never_wins():
    scored = branching_score(torch.tensor([[1.0, 3.0]]), torch.tensor([[-1.0, 1.0]]), ones(1, 2), gamma=1.0, clip=0.2)
    points = select_branch_points(
        scored.score, scored.entropy_z, scored.future_value_z, ones(1, 2), torch.tensor([0]), count=2, scope="root"
    )
    assert places(points) == [(0, 1)]


def test_tool_tokens_have_no_score_and_no_influence():
    entropy, gain, mask = random_roots(0)
    clean = branching_score(entropy, gain, mask, gamma=0.9, clip=0.2)
    soiled = branching_score(
        entropy.masked_fill(~mask, torch.nan), gain.masked_fill(~mask, torch.nan), mask, gamma=0.9, clip=0.2
    )
    assert not clean.score[~mask].any()
    assert torch.equal(clean.score, soiled.score)


def test_padding_changes_no_score():
    entropy, gain, mask = random_roots(1)
    pad = torch.nn.functional.pad
    short = branching_score(entropy, gain, mask, gamma=0.9, clip=0.2).score
    long = branching_score(pad(entropy, (0, 9)), pad(gain, (0, 9)), pad(mask, (0, 9)), gamma=0.9, clip=0.2).score
    torch.testing.assert_close(long[:, :12], short)
    assert not long[:, 12:].any()


def test_permuting_roots_permutes_scores():
    entropy, gain, mask = random_roots(2)
    order = torch.tensor([2, 0, 3, 1])
    plain = branching_score(entropy, gain, mask, gamma=0.9, clip=0.2).score
    permuted = branching_score(entropy[order], gain[order], mask[order], gamma=0.9, clip=0.2).score
    torch.testing.assert_close(permuted, plain[order])


def test_every_root_gets_its_own_budget_in_scope_root():
    score = torch.tensor([[3.0, 9.0, 5.0], [1.0, 2.0, 0.5]])
    assert places(select(score, count=2, scope="root")) == [(0, 1), (0, 2), (1, 1), (1, 0)]


def test_roots_of_a_prompt_share_one_budget_in_scope_prompt():
    score = torch.tensor([[3.0, 9.0], [1.0, 0.0], [5.0, 4.0]])
    assert places(select(score, prompts=[7, 4, 7], count=3, scope="prompt")) == [(0, 1), (2, 0), (2, 1), (1, 0), (1, 1)]


def test_ties_break_by_position_then_root():
    assert places(select(torch.ones(2, 3), prompts=[0, 0], count=4, scope="prompt")) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert places(select(torch.ones(1, 3), count=2, scope="root")) == [(0, 0), (0, 1)]


def test_fewer_candidates_mean_fewer_branches():
    candidates = torch.tensor([[False, True, False]])
    assert places(select(torch.ones(1, 3), candidates, count=3, scope="root")) == [(0, 1)]
    assert select(torch.ones(1, 3), ~ones(1, 3), count=3, scope="root") == []
    assert select(torch.ones(1, 3), count=0, scope="root") == []


def test_the_gate_wants_both_z_scores_positive_unless_the_criterion_says_otherwise():
    score = torch.ones(1, 4)
    entropy_z = torch.tensor([[1.0, 1.0, -1.0, 0.0]])
    future_value_z = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    arguments = (score, entropy_z, future_value_z, ones(1, 4), torch.tensor([0]))
    assert places(select_branch_points(*arguments, count=4, scope="root")) == [(0, 0)]
    eligible = torch.tensor([[False, True, True, False]])
    assert places(select_branch_points(*arguments, count=4, scope="root", eligible=eligible)) == [(0, 1), (0, 2)]


def test_a_branch_point_carries_its_scores():
    score, entropy_z, future_value_z = torch.tensor([[3.0]]), torch.tensor([[1.5]]), torch.tensor([[2.0]])
    points = select_branch_points(
        score, entropy_z, future_value_z, ones(1, 1), torch.tensor([0]), count=1, scope="root"
    )
    assert points == [BranchPoint(root=0, position=0, score=3.0, entropy_z=1.5, future_value_z=2.0)]


@given(seed=st.integers(0, 2**16), count=st.integers(0, 5), scope=st.sampled_from(["root", "prompt"]))
def test_selection_equals_sorting_by_hand(seed, count, scope):
    generator = torch.Generator().manual_seed(seed)
    # Few distinct scores, so that ties are common.
    score = torch.randint(0, 3, (4, 6), generator=generator).float()
    candidates = torch.rand(4, 6, generator=generator) < 0.5
    prompts = torch.randint(0, 2, (4,), generator=generator).tolist()
    expected = []
    groups = [[row] for row in range(4)]
    if scope == "prompt":
        groups = [[row for row in range(4) if prompts[row] == prompt] for prompt in dict.fromkeys(prompts)]
    for rows in groups:
        found = [place for place in itertools.product(rows, range(6)) if candidates[place]]
        expected += sorted(found, key=lambda place: (-score[place].item(), place[1], place[0]))[:count]
    points = select(score, candidates, prompts, count=count, scope=scope)
    assert places(points) == expected
    assert len(set(places(points))) == len(points)


def test_candidates_are_sampled_readable_and_followed_by_something():
    mask = torch.tensor([[True, True, False, True, True, False]])
    blank = torch.tensor([[False, True, False, False, False, False]])
    # 0 is a candidate; 1 is blank; 2 and 5 were not sampled; 4 is the last sampled token.
    candidates = branch_candidates(mask, blank, max_response_tokens=100, min_remaining=1)
    assert candidates.tolist() == [[True, False, False, True, False, False]]


def test_candidates_leave_room_for_a_continuation():
    # After token t, t + 1 of 5 tokens are spent: 4, 3, 2, 1 remain after tokens 0, 1, 2, 3.
    candidates = branch_candidates(ones(1, 5), ~ones(1, 5), max_response_tokens=5, min_remaining=3)
    assert candidates.tolist() == [[True, True, False, False, False]]


def test_a_root_without_sampled_tokens_has_no_candidates():
    assert not branch_candidates(~ones(1, 3), ~ones(1, 3), max_response_tokens=9, min_remaining=1).any()


def test_wrong_input_is_refused_in_one_line():
    score, prompts = torch.ones(1, 3), torch.tensor([0])
    with pytest.raises(ValueError, match=r"log_ratio must have the shape of mask \[1, 3\], got \[1, 2\]"):
        future_value(torch.ones(1, 2), ones(1, 3), gamma=0.5, clip=0.2)
    with pytest.raises(ValueError, match=r"clip must be a finite number >= 0, got -0\.1"):
        future_value(score, ones(1, 3), gamma=0.5, clip=-0.1)
    with pytest.raises(ValueError, match="scope must be 'root' or 'prompt', got 'tree'"):
        select(score, count=1, scope="tree")
    with pytest.raises(ValueError, match="score must be finite"):
        select(score * torch.nan, count=1, scope="root")
    with pytest.raises(ValueError, match=r"root_prompt must be \[B\] = \[1\], got \[2\]"):
        select_branch_points(score, score, score, ones(1, 3), prompts.repeat(2), count=1, scope="root")
    with pytest.raises(ValueError, match="min_remaining must be a finite number >= 1, got 0"):
        branch_candidates(ones(1, 3), ones(1, 3), max_response_tokens=9, min_remaining=0)


def test_branches_are_shared_out_by_the_spread_of_the_roots_rewards():
    # Spreads 0, 1/2, 1/4 of 6 branches: quotas 0, 4, 2.
    assert share_branches([[1, 1], [0, 1], [0.5, 1]], 6) == [0, 4, 2]
    # Equal spreads of 5: quotas 5/3 each; two remainders are rounded up, the first ones.
    assert share_branches([[0, 1], [1, 0], [2, 1]], 5) == [2, 2, 1]
    # Nobody disagrees: all alike.
    assert share_branches([[1, 1], [0, 0]], 6) == [3, 3]
    assert share_branches([], 0) == []


def test_each_prompt_may_have_its_own_count():
    score = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    everywhere = torch.ones(2, 3, dtype=torch.bool)
    points = select_branch_points(score, score, score, everywhere, torch.tensor([4, 9]), count=[2, 0], scope="prompt")
    assert [(point.root, point.position) for point in points] == [(0, 2), (0, 1)]
