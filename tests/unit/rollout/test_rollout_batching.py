"""Claims about trees as padded rows, and about credit that does not depend on their order."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from appo_lightning.batching import ProcedureBatch, TraceScores, build_batch, pad_rows, pad_trajectories, token_mask
from appo_lightning.types import Branch, BranchPoint, RolloutTree, Trajectory
from helpers.scripted import make_task, rolled_out


def scores_of(trajectories: list[Trajectory], *, shift: float = 0.0) -> TraceScores:
    parts = []
    for trajectory in trajectories:
        mask = torch.tensor(trajectory.sampled)
        logprobs = (torch.tensor(trajectory.behaviour_logprobs) + shift) * mask
        parts.append(TraceScores(logprobs, torch.arange(1.0, len(mask) + 1) * mask))
    return TraceScores.joined(parts)


def branch(root: int, position: int, text: str, reward: float, *, prompt: str, prefix: int | None = None) -> Branch:
    """A branch whose prefix is one token per letter."""
    length = position + 1 if prefix is None else prefix
    pieces = [(letter, index >= length) for index, letter in enumerate(text)]
    point = BranchPoint(root, position, score=0.5 + position)
    return Branch(point, rolled_out(pieces, prompt=prompt, reward=reward), prefix_length=length)


def letters(text: str, reward: float, *, prompt: str) -> Trajectory:
    """One token per letter; "_" is a tool token."""
    return rolled_out([(letter, letter != "_") for letter in text], prompt=prompt, reward=reward)


def make_trees() -> list[RolloutTree]:
    """Prompts of 2 ("A?") and 3 ("BB?") tokens; roots of 4, 3, 2 and 5 tokens."""
    first = RolloutTree(
        make_task("A"),
        [letters("AB_D", 1.0, prompt="A?"), letters("XYZ", 0.0, prompt="A?")],
        [branch(0, 1, "ABcd", 3.0, prompt="A?"), branch(1, 0, "Xyzw", 1.0, prompt="A?")],
    )
    second = RolloutTree(
        make_task("B"),
        [letters("KL", 5.0, prompt="BB?"), letters("MNOPQ", 3.0, prompt="BB?")],
        [branch(1, 3, "MNOPx", 2.0, prompt="BB?")],
    )
    return [first, second]


def make_batch(trees: list[RolloutTree], *, train_branches: bool = False, shift: float = 0.1) -> ProcedureBatch:
    roots = [root for tree in trees for root in tree.roots]
    branches = [branch.trajectory for tree in trees for branch in tree.branches]
    return build_batch(
        trees,
        old=scores_of(roots),
        current=scores_of(roots, shift=shift),
        fallback=[index % 2 == 0 for index in range(len(roots))],
        temperature=0.7,
        branch_old=scores_of(branches) if train_branches else None,
        branch_current=scores_of(branches) if train_branches else None,
    )


def test_rows_are_prompt_then_response_then_padding():
    batch = make_batch(make_trees())
    assert batch.sequences.lengths.tolist() == [2 + 4, 2 + 3, 3 + 2, 3 + 5]
    assert batch.sequences.token_ids.shape == batch.mask.shape == (4, 8)
    assert batch.prompt_lengths.tolist() == [2, 2, 3, 3]
    root = batch.trees[0].roots[0]
    assert batch.sequences.token_ids[0].tolist() == [*root.prompt_ids, *root.response_ids, 0, 0]
    # Two prompt tokens, A and B sampled, a tool token, D sampled, two of padding.
    assert batch.mask[0].tolist() == [False, False, True, True, False, True, False, False]
    assert batch.behaviour_logprobs[0, 2:6].tolist() == pytest.approx(root.behaviour_logprobs)
    assert batch.behaviour_logprobs[0, :2].tolist() == batch.behaviour_logprobs[0, 6:].tolist() == [0.0, 0.0]
    assert batch.entropies[0].tolist() == [0, 0, 1, 2, 0, 4, 0, 0]
    gain = batch.current_logprobs - batch.old_logprobs
    assert gain[0].tolist() == pytest.approx([0, 0, 0.1, 0.1, 0, 0.1, 0, 0], abs=1e-6)
    assert batch.rewards.tolist() == [1.0, 0.0, 5.0, 3.0]
    assert batch.prompt_index.tolist() == [0, 0, 1, 1]
    assert batch.policy_version.tolist() == [3, 3, 3, 3]
    assert batch.fallback.tolist() == [True, False, True, False]
    assert (batch.num_roots, batch.temperature, batch.advantages) == (4, 0.7, None)


def test_branches_enter_as_numbers_with_the_row_of_their_root():
    batch = make_batch(make_trees())
    assert batch.branch_root.tolist() == [0, 1, 3]
    # The last kept token, counted in the row: 2 + 1, 2 + 0, 3 + 3.
    assert batch.branch_position.tolist() == [3, 2, 6]
    assert batch.branch_reward.tolist() == [3.0, 1.0, 2.0]
    assert batch.branch_score.tolist() == [1.5, 0.5, 3.5]
    assert batch.branch_row is None


def test_a_token_sampled_again_is_not_shared():
    # keep_token false at position 1: the prefix ends with token 0; at position 0 only the prompt is shared.
    trees = make_trees()
    trees[0].branches = [
        branch(0, 1, "Axyz", 3.0, prompt="A?", prefix=1),
        branch(0, 0, "wxyz", 1.0, prompt="A?", prefix=0),
    ]
    batch = make_batch(trees)
    assert batch.branch_position.tolist() == [2, 1, 6]
    advantages = advantages_of(batch, scaling=0.0, normalise_std=False)
    # Roots 1 and 0: +-0.5. Branches 3 and 1: +-1. Token 0 is shared with the first branch only.
    assert advantages[0].tolist() == pytest.approx([0, 0, 1.5, 0.5, 0, 0.5, 0, 0])


def test_with_train_branches_they_are_rows_behind_the_roots():
    batch = make_batch(make_trees(), train_branches=True)
    assert batch.num_roots == 4
    assert batch.branch_row is not None
    assert batch.branch_row.tolist() == [4, 5, 6]
    assert batch.prompt_index.tolist() == [0, 0, 1, 1, 0, 0, 1]
    assert batch.rewards.tolist() == [1.0, 0.0, 5.0, 3.0, 3.0, 1.0, 2.0]
    # "ABcd": the prefix AB belongs to the root.
    assert batch.mask[4].tolist() == [False, False, False, False, True, True, False, False]
    assert torch.equal(batch.old_logprobs[4:], batch.current_logprobs[4:])


def test_a_batch_without_branches_is_still_whole():
    trees = make_trees()
    for tree in trees:
        tree.branches = []
    for batch in (make_batch(trees), make_batch(trees, train_branches=True)):
        assert (batch.branch_root.dtype, batch.branch_position.dtype) == (torch.long, torch.long)
        assert (batch.branch_reward.dtype, batch.branch_score.dtype) == (torch.float32, torch.float32)
        # Groups of two: +-1 over a std of 0.5 or 1, each with 1e-6.
        assert advantages_of(batch, scaling=0.0)[:, 3].tolist() == pytest.approx([1, -1, 1, -1], abs=1e-5)


def test_a_trajectory_without_reward_is_our_mistake():
    trees = make_trees()
    trees[0].roots[0].reward = None
    with pytest.raises(AssertionError, match="score trajectories before batching"):
        make_batch(trees)


def test_values_that_do_not_fit_their_response_are_refused():
    # In all there are five values for five tokens.
    with pytest.raises(ValueError, match=r"got \[3, 2\] for \[2, 3\]: give one per token"):
        pad_rows([[0.5] * 3, [0.5] * 2], token_mask([2, 3]))
    with pytest.raises(ValueError, match=r"got \[4\] for \[5\]"):
        pad_rows(torch.ones(4), token_mask([2, 3]))


def test_values_stand_where_their_response_does():
    inside = token_mask([2, 3], starts=[2, 0])
    assert inside.tolist() == [[False, False, True, True], [True, True, True, False]]
    padded = [[0, 0, 1, 2], [3, 4, 5, 0]]
    assert pad_rows([[1, 2], [3, 4, 5]], inside, np.int64).tolist() == padded
    assert pad_rows(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), inside).tolist() == padded
    assert pad_rows([], token_mask([])).shape == (0, 1)


def test_some_rows_have_the_padding_that_they_need():
    sequences = make_batch(make_trees()).sequences
    part = sequences.rows(torch.tensor([2, 1]))
    assert part.token_ids.shape == part.mask.shape == (2, 5)
    assert torch.equal(part.token_ids[1], sequences.token_ids[1, :5])
    assert pad_trajectories([]).token_ids.shape == (0, 1)


def test_every_tensor_moves_to_the_device_and_the_trees_stay():
    batch = make_batch(make_trees(), train_branches=True)
    advantages_of(batch)
    moved = batch.to(torch.device("meta"))
    assert moved.trees is batch.trees
    tensors = [name for name in batch.__dataclass_fields__ if isinstance(getattr(batch, name), torch.Tensor)]
    assert {getattr(moved, name).device.type for name in tensors} == {"meta"}
    assert {"advantages", "influence", "fallback", "branch_row"} <= set(tensors)
    assert moved.sequences.token_ids.device.type == moved.mask.device.type == "meta"
    assert batch.mask.device.type == "cpu"


def test_lightning_moves_a_batch_as_one():
    from lightning.pytorch.utilities import move_data_to_device

    batch = make_batch(make_trees())
    moved = move_data_to_device(batch, torch.device("meta"))
    assert moved.mask.device.type == "meta"


# --- credit ----------------------------------------------------------------------------------------------------------


def advantages_of(batch: ProcedureBatch, **options: object) -> torch.Tensor:
    from appo_lightning.callbacks.advantage_scaling import ProcedureAdvantageScaling

    callback = ProcedureAdvantageScaling(**options)  # type: ignore[arg-type]
    callback.on_train_batch_start(None, None, batch, 0)  # type: ignore[arg-type]
    assert batch.advantages is not None
    return batch.advantages


def test_credit_is_shared_up_to_the_branch_point():
    batch = make_batch(make_trees())
    advantages = advantages_of(batch, scaling=0.0, normalise_std=False)
    # Task A: roots 1, 0 around 0.5; branches 3, 1 around 2. Task B: roots 5, 3 around 4; one branch: 0.
    assert advantages[0].tolist() == pytest.approx([0, 0, 1.5, 1.5, 0, 0.5, 0, 0])
    assert advantages[1].tolist() == pytest.approx([0, 0, -1.5, -0.5, -0.5, 0, 0, 0])
    assert advantages[2].tolist() == pytest.approx([0, 0, 0, 1, 1, 0, 0, 0])
    assert advantages[3].tolist() == pytest.approx([0, 0, 0, -1, -1, -1, -1, -1])


def test_the_branches_own_tokens_get_the_advantage_of_their_branch():
    batch = make_batch(make_trees(), train_branches=True)
    advantages = advantages_of(batch, scaling=0.0, normalise_std=False)
    assert advantages[4].tolist() == pytest.approx([0, 0, 0, 0, 1, 1, 0, 0])
    assert advantages[5].tolist() == pytest.approx([0, 0, 0, -1, -1, -1, 0, 0])
    assert advantages[6].tolist() == pytest.approx([0.0] * 8)
    # The roots' credit is that of the batch without these rows.
    plain = advantages_of(make_batch(make_trees()), scaling=0.0, normalise_std=False)
    assert torch.equal(advantages[:4], plain)


@pytest.mark.parametrize("train_branches", [False, True])
@pytest.mark.parametrize("options", [{}, {"centred": True, "high_only": False}, {"normalise_std": False}])
def test_permuting_prompts_and_siblings_permutes_advantages(train_branches, options):
    shuffle = random.Random(0)
    batch = make_batch(make_trees(), train_branches=train_branches)
    advantages_of(batch, **options)
    expected = rows_by_identity(batch)
    for _ in range(5):
        trees = [permuted(tree, shuffle) for tree in make_trees()]
        shuffle.shuffle(trees)
        other = make_batch(trees, train_branches=train_branches)
        advantages_of(other, **options)
        found = rows_by_identity(other)
        assert found.keys() == expected.keys()
        for identity, advantages in found.items():
            assert advantages == pytest.approx(expected[identity], abs=1e-6)


def permuted(tree: RolloutTree, shuffle: random.Random) -> RolloutTree:
    order = list(range(len(tree.roots)))
    shuffle.shuffle(order)
    branches = [
        Branch(BranchPoint(order.index(b.point.root), b.point.position, b.point.score), b.trajectory, b.prefix_length)
        for b in tree.branches
    ]
    shuffle.shuffle(branches)
    return RolloutTree(tree.task, [tree.roots[i] for i in order], branches)


def rows_by_identity(batch: ProcedureBatch) -> dict[tuple[str, int], list[float]]:
    assert batch.advantages is not None
    rows = [root for tree in batch.trees for root in tree.roots]
    if batch.branch_row is not None:
        rows += [branch.trajectory for tree in batch.trees for branch in tree.branches]
    return {
        (row.response_text, row.num_sampled): batch.advantages[index, : int(batch.sequences.lengths[index])].tolist()
        for index, row in enumerate(rows)
    }
