import pytest
import torch

from appo_lightning.algorithm import (
    branching_score,
    score_criterion,
    select_branch_points,
    suppress_noise,
    tool_boundary_mask,
)

ENTROPY = torch.tensor([[1.0, 2.0, 3.0, 0.0]])
# Suffix sums at gamma 1: 0, 0.1, -0.1, 0.1 -> the future value is high at 1 and 3.
GAIN = torch.tensor([[-0.1, 0.2, -0.2, 0.1]])
MASK = torch.ones(1, 4, dtype=torch.bool)


def score(criterion, entropy=ENTROPY, gain=GAIN, mask=MASK, **options):
    return score_criterion(criterion, entropy, gain, mask, gamma=1.0, clip=0.2, **options)


def positions(scored, mask=MASK, count=9):
    points = select_branch_points(
        scored.score,
        scored.entropy_z,
        scored.future_value_z,
        mask,
        torch.arange(len(mask)),
        count=count,
        scope="root",
        eligible=scored.eligible,
    )
    return [point.position for point in points]


def test_branching_score_needs_uncertainty_and_a_gain():
    scored = score("branching_score")
    expected = branching_score(ENTROPY, GAIN, MASK, gamma=1.0, clip=0.2)
    assert torch.equal(scored.score, expected.score)
    assert not scored.fallback.any()
    # Entropy is above its mean 1.5 at 1 and 2, the future value above its mean at 1 and 3.
    assert positions(scored) == [1]


def test_entropy_ranks_by_uncertainty_alone():
    assert positions(score("entropy")) == [2, 1]


def test_future_value_ranks_by_gain_alone():
    assert positions(score("future_value")) == [1, 3]


def test_weighted_sum_lets_one_term_make_up_for_the_other():
    scored = score("weighted_sum", weights=(2.0, 0.5))
    torch.testing.assert_close(scored.score, 2.0 * scored.entropy_z + 0.5 * scored.future_value_z)
    # z(H) = -.45, .45, 1.34, -1.34: token 2 wins in spite of its gain; tokens below 0 are out.
    assert positions(scored) == [2, 1]


def test_random_ranks_by_the_draws_and_has_no_gate():
    assert positions(score("random", draws=torch.tensor([[0.2, 0.9, 0.0, 0.5]]))) == [1, 3, 0, 2]


def test_tool_boundary_takes_the_earliest_boundaries():
    after_tool = torch.tensor([[False, True, False, True]])
    assert positions(score("tool_boundary", after_tool=after_tool)) == [1, 3]
    assert positions(score("tool_boundary", after_tool=after_tool), count=1) == [1]


def test_criteria_without_gain_never_fall_back():
    silent = torch.zeros(1, 4)
    after_tool = torch.tensor([[False, True, False, True]])
    for criterion in ("entropy", "random", "tool_boundary"):
        scored = score(criterion, gain=silent, after_tool=after_tool, draws=torch.rand(1, 4))
        assert not scored.fallback.any(), criterion


@pytest.mark.parametrize("criterion", ["branching_score", "future_value", "weighted_sum"])
def test_right_after_a_sync_numerical_noise_chooses_no_branch(criterion):
    generator = torch.Generator().manual_seed(0)
    noise = 1e-3 * torch.randn(1, 4, generator=generator)
    scored = score(criterion, gain=noise, noise_floor=2e-3)
    assert scored.fallback.tolist() == [True]
    assert not scored.future_value_z.any()
    assert positions(scored) == positions(score("entropy"))


def test_only_the_degenerate_root_falls_back():
    entropy, mask = ENTROPY.repeat(2, 1), MASK.repeat(2, 1)
    gain = torch.cat([GAIN, 1e-4 * GAIN])
    scored = score("branching_score", entropy, gain, mask, noise_floor=1e-3)
    assert scored.fallback.tolist() == [False, True]
    alone = score("branching_score", noise_floor=1e-3)
    torch.testing.assert_close(scored.score[:1], alone.score)
    torch.testing.assert_close(scored.score[1], scored.entropy_z[1])


def test_an_exactly_silent_gain_is_degenerate_without_a_floor():
    assert score("branching_score", gain=torch.zeros(1, 4)).fallback.tolist() == [True]


def test_a_root_whose_future_values_all_hit_one_clip_bound_falls_back():
    # Every suffix sum exceeds log 1.2: only rounding is left to rank by.
    gain = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    scored = score("branching_score", gain=gain)
    assert scored.fallback.tolist() == [True]
    assert positions(scored) == [2, 1]


def test_a_root_without_sampled_tokens_neither_branches_nor_falls_back():
    scored = score("branching_score", mask=~MASK)
    assert scored.fallback.tolist() == [False]
    assert not scored.eligible.any()


def test_gains_below_a_multiple_of_the_floor_count_as_zero():
    gain, degenerate = suppress_noise(torch.tensor([[0.02, -0.5, 0.03, 9.0]]), MASK, noise_floor=0.01)
    assert gain.tolist() == [[0.0, -0.5, pytest.approx(0.03), 9.0]]
    assert degenerate.tolist() == [False]


def test_the_floor_reads_sampled_tokens_only():
    mask = torch.tensor([[True, True, False, True]])
    gain, degenerate = suppress_noise(torch.tensor([[0.0, 0.001, 7.0, 0.0]]), mask, noise_floor=0.01)
    assert not gain.any()
    assert degenerate.tolist() == [True]


def test_tool_boundary_is_the_first_sampled_token_after_a_result():
    mask = torch.tensor([[True, False, False, True, True, False], [True, True, True, False, False, False]])
    # Root 0: the result ends at 2, token 2 was forced, 3 is the first sampled; nothing is sampled after 6.
    # Root 1: the response ends with a result.
    boundary = tool_boundary_mask(mask, [[2, 6], [4]])
    assert boundary.nonzero().tolist() == [[0, 3]]


def test_wrong_options_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"criterion must be one of branching_score, .* got 'tool_entropy'"):
        score("tool_entropy")
    with pytest.raises(ValueError, match="random needs draws, got None"):
        score("random")
    with pytest.raises(ValueError, match="tool_boundary needs after_tool, got None"):
        score("tool_boundary")
    with pytest.raises(ValueError, match=r"w_Omega must be a finite number > 0, got 0\.0: use the criterion 'entropy'"):
        score("weighted_sum", weights=(1.0, 0.0))
    with pytest.raises(ValueError, match="noise_floor must be a finite number >= 0, got -1"):
        score("branching_score", noise_floor=-1)
    with pytest.raises(ValueError, match="result_stops must have 1 entries, got 2"):
        tool_boundary_mask(MASK, [[], []])
    with pytest.raises(ValueError, match=r"a result must stop within \[0, 4\], got 5"):
        tool_boundary_mask(MASK, [[5]])
