"""Claims about where a tree branches and which options say so."""

from __future__ import annotations

import math
from itertools import chain

import pytest
import torch

from appo_lightning.batching import TraceScores
from appo_lightning.errors import ConfigurationError
from appo_lightning.rollout.tree import (
    BlankTokens,
    BranchingOptions,
    BranchPlan,
    attach_branches,
    branch_prefixes,
    plan_branches,
    score_rewards,
)
from appo_lightning.types import BranchPoint, RolloutTree, ToolCall, Trajectory
from helpers.scripted import LengthReward, ids_of, make_task, rolled_out, scripted_tokenizer

NEXT_TOKEN_ONLY = 0.05  # half-life: gamma = 2^-20, so a future value is the gain of its own token


def root_of(letters: str, *, calls: list[ToolCall] | None = None) -> Trajectory:
    """One token per letter; "_" is a tool token."""
    return rolled_out([(letter, letter != "_") for letter in letters], tool_calls=calls or [])


def plan(
    groups: list[list[Trajectory]],
    entropies: list[list[float]],
    gains: list[list[float]],
    *,
    noise_floor: float = 0.0,
    max_response_tokens: int = 1000,
    seed: int = 0,
    **options: object,
) -> BranchPlan:
    return plan_branches(
        [RolloutTree(make_task(f"t{i}"), roots) for i, roots in enumerate(groups)],
        TraceScores(torch.tensor([*chain(*gains)]) - 1.0, torch.tensor([*chain(*entropies)])),
        torch.full_like(torch.tensor([*chain(*gains)]), -1.0),
        BranchingOptions(**{"min_remaining": 1, "half_life": NEXT_TOKEN_ONLY, **options}),  # type: ignore[arg-type]
        noise_floor=noise_floor,
        max_response_tokens=max_response_tokens,
        is_blank=BlankTokens(scripted_tokenizer()),
        seed=seed,
    )


def places(made: BranchPlan) -> list[list[tuple[int, int]]]:
    return [[(point.root, point.position) for point in points] for points in made.points]


def test_the_branching_score_takes_tokens_that_are_uncertain_and_became_likelier():
    # H: mean 1, std sqrt(1/2), z of the 2s = 1/sqrt(1/2) = sqrt 2. Gain 0.1 on two of six tokens: z = sqrt 2.
    # Both are positive at token 2 only: score 2. Token 0 is uncertain but no likelier, token 1 the other way round.
    entropy, gain = [2.0, 0.5, 2.0, 0.5, 0.5, 0.5], [0.0, 0.1, 0.1, 0.0, 0.0, 0.0]
    made = plan([[root_of("ABCDEF")]], [entropy], [gain], num_roots=1, num_rollouts=3)
    (point,) = made.points[0]
    assert (point.root, point.position) == (0, 2)
    assert point.score == pytest.approx(2.0, rel=1e-3)
    assert point.entropy_z == pytest.approx(math.sqrt(2), rel=1e-3)
    assert point.future_value_z == pytest.approx(math.sqrt(2), rel=1e-3)
    assert made.fallback == [False]


def test_tool_tokens_take_no_part():
    # The same six sampled tokens with tool tokens between: the same scores, later positions.
    entropy, gain = [2.0, 0.5, 9.0, 9.0, 2.0, 0.5, 0.5, 0.5], [0.0, 0.1, 5.0, -5.0, 0.1, 0.0, 0.0, 0.0]
    made = plan([[root_of("AB__CDEF")]], [entropy], [gain], num_roots=1, num_rollouts=3)
    (point,) = made.points[0]
    assert point.position == 4
    assert point.score == pytest.approx(2.0, rel=1e-3)


def test_entropy_ranks_alone_where_the_policy_has_not_moved():
    # z(H) > 0 at tokens 0, 2 and 4; the best two of them.
    entropy = [1.5, 0.1, 2.0, 0.1, 1.0, 0.1]
    made = plan([[root_of("ABCDEF")]], [entropy], [[0.0] * 6], num_roots=1, num_rollouts=3)
    assert places(made) == [[(0, 2), (0, 0)]]
    assert made.fallback == [True]


def test_noise_below_the_measured_floor_chooses_nothing():
    entropy = [1.5, 0.1, 2.0, 0.1, 1.0, 0.1]
    noise = [0.002, -0.001, -0.002, 0.001, 0.002, -0.001]
    made = plan([[root_of("ABCDEF")]], [entropy], [noise], num_roots=1, num_rollouts=3, noise_floor=0.001)
    assert places(made) == [[(0, 2), (0, 0)]]
    assert made.fallback == [True]


def test_fallback_is_told_root_by_root():
    entropy = [2.0, 0.5, 2.0, 0.5, 0.5, 0.5]
    made = plan(
        [[root_of("ABCDEF"), root_of("ABCDEF")]],
        [entropy, entropy],
        [[0.0, 0.1, 0.1, 0.0, 0.0, 0.0], [0.0] * 6],
        num_roots=2,
        num_rollouts=4,
    )
    assert made.fallback == [False, True]
    assert places(made) == [[(0, 2), (1, 0)]]


def entropies_at(*places: int, length: int) -> list[float]:
    return [3.0 - 0.1 * places.index(t) if t in places else 0.1 for t in range(length)]


@pytest.mark.parametrize(
    ("letters", "uncertain", "budget", "chosen"),
    [
        ("ABCDEF", (5, 1), 1000, [1]),  # the last sampled token has nothing after it
        ("ABCD__", (3, 1), 1000, [1]),  # also when a tool result follows
        ("A CDEF", (1, 2), 1000, [2]),  # white space
        ("A_CDEF", (1, 2), 1000, [2]),  # a tool's token
        ("ABCDEF", (4, 2), 10, [4, 2]),  # 5 tokens spent, 5 left
        ("ABCDEF", (4, 2), 9, [2]),  # 4 left are fewer than min_remaining
    ],
)
def test_only_candidates_are_chosen(letters, uncertain, budget, chosen):
    made = plan(
        [[root_of(letters)]],
        [entropies_at(*uncertain, length=len(letters))],
        [[0.0] * len(letters)],
        num_roots=1,
        num_rollouts=3,
        criterion="entropy",
        min_remaining=5,
        max_response_tokens=budget,
    )
    assert [position for _, position in places(made)[0]] == chosen


def test_scope_root_gives_every_root_its_share_and_scope_prompt_takes_the_best():
    # Root 1 is longer and padded differently; its peaks stand out more.
    groups = [[root_of("ABCDEF"), root_of("ABCDEFGHIJ")], [root_of("ABCD"), root_of("ABCDE")]]
    entropy = [
        entropies_at(0, 1, length=6),
        entropies_at(3, 7, length=10),
        entropies_at(0, length=4),
        entropies_at(1, length=5),
    ]
    gain = [[0.0] * len(row) for row in entropy]
    by_root = plan(groups, entropy, gain, num_roots=2, num_rollouts=4, criterion="entropy")
    assert places(by_root) == [[(0, 0), (1, 3)], [(0, 0), (1, 1)]]
    by_prompt = plan(groups, entropy, gain, num_roots=2, num_rollouts=4, criterion="entropy", scope="prompt")
    # Two of ten at about 3, others 0.1: z = 2.1 and 1.9. Two of six: 1.5, 1.3. One of five: 2; one of four: 1.7.
    assert places(by_prompt) == [[(1, 3), (1, 7)], [(1, 1), (0, 0)]]


def test_fewer_candidates_make_fewer_branches():
    made = plan([[root_of("AB")]], [[2.0, 0.1]], [[0.0, 0.0]], num_roots=1, num_rollouts=9, criterion="entropy")
    assert places(made) == [[(0, 0)]]


def test_random_branches_are_a_function_of_the_seed():
    def draw(seed: int) -> list[list[tuple[int, int]]]:
        root = root_of("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        return places(
            plan([[root]], [[1.0] * 26], [[0.0] * 26], num_roots=1, num_rollouts=4, criterion="random", seed=seed)
        )

    assert draw(1) == draw(1)
    assert len(draw(1)[0]) == 3
    assert len({str(draw(seed)) for seed in range(8)}) > 1


def test_random_branches_of_a_task_do_not_depend_on_what_else_is_in_the_mini_batch():
    def draw(*tasks: str) -> dict[str, list[tuple[int, int]]]:
        trees = [RolloutTree(make_task(task), [root_of("ABCDEFGHIJKL"), root_of("ABCDEFG" + task)]) for task in tasks]
        tokens = sum(len(root.response_ids) for tree in trees for root in tree.roots)
        made = plan_branches(
            trees,
            TraceScores(torch.zeros(tokens), torch.ones(tokens)),
            torch.zeros(tokens),
            BranchingOptions(num_roots=2, num_rollouts=8, criterion="random", min_remaining=1),
            noise_floor=0.0,
            max_response_tokens=1000,
            is_blank=BlankTokens(scripted_tokenizer()),
            seed=7,
        )
        return dict(zip(tasks, places(made), strict=True))

    together = draw("x", "yy", "zzzzzzzz")
    assert together == {**draw("zzzzzzzz", "x"), **draw("yy")}
    assert len(set(map(str, together.values()))) == 3


def test_tool_boundaries_are_the_first_tokens_after_results():
    calls = [ToolCall("search", "", "", 1, 3, True, 0.0), ToolCall("search", "", "", 4, 5, True, 0.0)]
    root = root_of("A__B_CD", calls=calls)
    made = plan([[root]], [[1.0] * 7], [[0.0] * 7], num_roots=1, num_rollouts=4, criterion="tool_boundary")
    assert places(made) == [[(0, 3), (0, 5)]]


def test_without_branches_nothing_is_planned():
    made = plan([[root_of("AB")], [root_of("CD")]], [[1.0, 0.0]] * 2, [[0.0, 0.0]] * 2, num_roots=1, num_rollouts=1)
    assert (made.points, made.fallback) == ([[], []], [False, False])


def test_a_root_without_a_sampled_token_is_no_trouble():
    made = plan(
        [[root_of("__"), root_of("ABC")]],
        [[0.0, 0.0], [2.0, 0.1, 0.1]],
        [[0.0] * 2, [0.0] * 3],
        num_roots=2,
        num_rollouts=4,
    )
    assert places(made) == [[(1, 0)]]


@pytest.mark.parametrize(("keep_token", "length"), [(True, 4), (False, 3)])
def test_a_prefix_keeps_the_token_at_the_branch_point_or_samples_it_again(keep_token, length):
    tree = RolloutTree(make_task(), [root_of("ABCDEF")])
    point = BranchPoint(0, 3, 1.0)
    prefixes = branch_prefixes(tree, [point], keep_token=keep_token, seed=0)
    assert prefixes[0].response_ids == [ids_of(letter)[0] for letter in "ABCDEF"[:length]]
    attach_branches(tree, [point], prefixes, [root_of("ABCxyz")])
    assert tree.branches[0].prefix_length == length
    assert tree.branches[0].point is point


def test_blank_tokens_are_white_space_and_special_tokens():
    ids = torch.tensor([[ids_of(text)[0] for text in (" ", "A", "\n")], [0, 2, ids_of("é")[0]]])
    blank = BlankTokens(scripted_tokenizer())
    assert blank(ids).tolist() == [[True, False, True], [True, True, False]]
    assert blank(ids).tolist() == blank(ids.clone()).tolist()


def test_rewards_are_written_with_their_parts():
    trajectories = [rolled_out("a7"), rolled_out("abc")]
    score_rewards(LengthReward(), make_task(), trajectories)
    assert [(t.reward, t.success, t.reward_parts) for t in trajectories] == [
        (2.0, True, {"sevens": 1.0}),
        (3.0, False, {"sevens": 0.0}),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_roots": 0}, "num_roots must be at least 1, got 0"),
        ({"num_roots": 8, "num_rollouts": 4}, "got M = 4 < N = 8"),
        ({"num_roots": 4, "num_rollouts": 10}, "num_rollouts - num_roots = 6 must be a multiple of num_roots = 4"),
        ({"half_life": 0.0}, "half_life must be a positive number of tokens, got 0.0"),
        ({"clip": 1.0}, r"clip must be in \[0, 1\), got 1.0"),
        ({"noise_floor_multiple": -1.0}, "noise_floor_multiple must be a number >= 0, got -1.0"),
        ({"min_remaining": 0}, "min_remaining must be at least 1, got 0"),
        ({"criterion": "weighted_sum", "weights": (0.0, 1.0)}, r"weights must be positive, got \(0.0, 1.0\)"),
        ({"num_roots": 4, "num_rollouts": 4, "gain_baseline": "previous"}, "'previous' has no effect without branches"),
        ({"criterion": "entropy", "gain_baseline": "previous"}, "'previous' has no effect without branches"),
    ],
)
def test_options_that_contradict_are_refused_in_one_line(options, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        BranchingOptions(**options)
    assert "\n" not in str(caught.value)


def test_scope_prompt_needs_no_equal_shares():
    assert BranchingOptions(num_roots=4, num_rollouts=10, scope="prompt").num_branches == 6
