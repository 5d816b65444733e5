import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from appo_lightning.algorithm import (
    branch_advantage,
    dual_group_advantage,
    future_influence,
    group_advantage,
    scale_by_influence,
)

LONG = torch.long


def ones(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def no_branches():
    return torch.zeros(0), torch.zeros(0, dtype=LONG), torch.zeros(0, dtype=LONG)


def random_tree(seed, prompts=3, roots=4, branches=10, tokens=9):
    generator = torch.Generator().manual_seed(seed)
    rows = prompts * roots
    return (
        torch.rand(rows, generator=generator),
        torch.arange(prompts).repeat_interleave(roots),
        torch.rand(rows, tokens, generator=generator) < 0.8,
        torch.rand(branches, generator=generator),
        torch.randint(0, rows, (branches,), generator=generator),
        torch.randint(0, tokens, (branches,), generator=generator),
    )


def dual_by_loop(root_reward, root_prompt, mask, branch_reward, branch_root, branch_position):
    def normalised(rewards, prompts):
        advantage = torch.zeros(len(rewards))
        for prompt in set(prompts.tolist()):
            group = (prompts == prompt).nonzero().squeeze(1)
            if len(group) > 1:
                values = rewards[group]
                advantage[group] = (values - values.mean()) / (values.std(unbiased=False) + 1e-6)
        return advantage

    root = normalised(root_reward, root_prompt)
    branch = normalised(branch_reward, root_prompt[branch_root])
    out = torch.zeros(mask.shape)
    for n in range(mask.shape[0]):
        for t in range(mask.shape[1]):
            shared = [
                branch[b].item() for b in range(len(branch)) if branch_root[b] == n and int(branch_position[b]) >= t
            ]
            out[n, t] = mask[n, t] * (root[n] + (sum(shared) / len(shared) if shared else 0.0))
    return out


def influence(log_ratio, advantage=None, mask=None, **options):
    log_ratio = torch.tensor([log_ratio])
    advantage = torch.ones_like(log_ratio) if advantage is None else torch.tensor([advantage])
    mask = ones(*log_ratio.shape) if mask is None else torch.tensor([mask])
    defaults = {"gamma": 0.5, "clip": 0.2, "high_only": False, "dual_clip": 3.0, "safety_threshold": 6.0}
    return future_influence(log_ratio, advantage, mask, **(defaults | options))


def test_a_group_is_compared_with_itself():
    # Group 5: mean 0.5, std 0.5 -> 1, -1. Group 2 has one member.
    advantage = group_advantage(torch.tensor([1.0, 7.0, 0.0]), torch.tensor([5, 2, 5]))
    torch.testing.assert_close(advantage, torch.tensor([1.0, 0.0, -1.0]), rtol=0, atol=1e-5)
    plain = group_advantage(torch.tensor([1.0, 7.0, 0.0]), torch.tensor([5, 2, 5]), normalise_std=False)
    assert plain.tolist() == [0.5, 0.0, -0.5]


@pytest.mark.parametrize("reward", [0.1, 1.1, 1 / 3])
def test_equal_rewards_teach_nothing_whatever_the_rounding(reward):
    assert not group_advantage(torch.full((7,), reward), torch.zeros(7)).any()


def test_a_token_shares_the_outcome_of_the_branches_that_leave_at_it_or_later():
    # Roots: rewards 1, 0 -> advantages 1, -1. Branches, both of root 0: rewards 1, 0 -> 1, -1, at positions 0 and 2.
    # Token 0: 1 + mean(1, -1) = 1; tokens 1, 2: 1 - 1 = 0; token 3: 1. Root 1 has no branch.
    advantage = dual_group_advantage(
        torch.tensor([1.0, 0.0]),
        torch.tensor([0, 0]),
        ones(2, 4),
        torch.tensor([1.0, 0.0]),
        torch.tensor([0, 0]),
        torch.tensor([0, 2]),
    )
    expected = torch.tensor([[1.0, 0.0, 0.0, 1.0], [-1.0, -1.0, -1.0, -1.0]])
    torch.testing.assert_close(advantage, expected, rtol=0, atol=1e-5)


def test_two_branches_at_one_position_both_count():
    # Branch rewards 1, 1, 0: mean 2/3, deviations 1/3, 1/3, -2/3; no std. Root 0: mean(1/3, 1/3); root 1: -2/3.
    advantage = dual_group_advantage(
        torch.tensor([0.0, 0.0]),
        torch.tensor([0, 0]),
        ones(2, 2),
        torch.tensor([1.0, 1.0, 0.0]),
        torch.tensor([0, 0, 1]),
        torch.tensor([0, 0, 1]),
        normalise_std=False,
    )
    torch.testing.assert_close(advantage, torch.tensor([[1 / 3, 0.0], [-2 / 3, -2 / 3]]))


def test_tool_tokens_receive_no_credit():
    arguments = random_tree(0)
    assert not dual_group_advantage(*arguments)[~arguments[2]].any()


@given(seed=st.integers(0, 2**16), branches=st.integers(0, 12))
def test_dual_group_advantage_equals_the_loop(seed, branches):
    arguments = random_tree(seed, branches=branches)
    torch.testing.assert_close(dual_group_advantage(*arguments), dual_by_loop(*arguments), rtol=0, atol=1e-4)


@given(seed=st.integers(0, 2**16))
def test_permuting_siblings_permutes_advantages(seed):
    root_reward, root_prompt, mask, branch_reward, branch_root, branch_position = random_tree(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    roots, branches = torch.randperm(12, generator=generator), torch.randperm(10, generator=generator)
    plain = dual_group_advantage(root_reward, root_prompt, mask, branch_reward, branch_root, branch_position)
    permuted = dual_group_advantage(
        root_reward[roots],
        root_prompt[roots],
        mask[roots],
        branch_reward[branches],
        roots.argsort()[branch_root[branches]],
        branch_position[branches],
    )
    torch.testing.assert_close(permuted, plain[roots], rtol=0, atol=1e-5)


def test_padding_changes_no_advantage():
    root_reward, root_prompt, mask, *branches = random_tree(3)
    padded = dual_group_advantage(root_reward, root_prompt, torch.nn.functional.pad(mask, (0, 7)), *branches)
    torch.testing.assert_close(padded[:, :9], dual_group_advantage(root_reward, root_prompt, mask, *branches))
    assert not padded[:, 9:].any()


def test_without_branches_it_is_the_group_advantage():
    reward, prompt = torch.tensor([1.0, 0.0, 4.0]), torch.tensor([0, 0, 1])
    advantage = dual_group_advantage(reward, prompt, ones(3, 2), *no_branches())
    torch.testing.assert_close(advantage, group_advantage(reward, prompt).unsqueeze(1).expand(3, 2))


def test_branch_tokens_carry_their_own_advantage_and_the_prefix_none():
    mask = torch.tensor([[False, True, True], [False, False, True], [True, True, True]])
    advantage = branch_advantage(torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0, 0, 1]), mask)
    expected = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(advantage, expected, rtol=0, atol=1e-5)


def test_influence_sums_what_follows():
    # D = 0.1 - 0.05 = 0.05, -0.1
    torch.testing.assert_close(influence([0.1, -0.1]), torch.tensor([[math.exp(0.05), math.exp(-0.1)]]))
    # Tool tokens add nothing but their distance: D_0 = 0.25 * 0.4
    out = influence([0.0, 5.0, 0.4], mask=[True, False, True], clip=0.9)
    assert out[0, 0].item() == pytest.approx(math.exp(0.1))


def test_influence_is_clipped():
    assert influence([2.0 / 2]).item() == pytest.approx(1.2)
    assert influence([-2.0]).item() == pytest.approx(0.8)
    assert influence([-2.0], high_only=True).item() == 1.0
    # Without a clip 10 is the bound: e^3 with a dual clip that lets it pass.
    assert influence([3.0], clip=0.0, dual_clip=99.0).item() == 10.0
    assert influence([-3.0], clip=0.0).item() == pytest.approx(math.exp(-3.0))


def test_tokens_beyond_the_dual_clip_leave_the_sum():
    # log 3 = 1.0986: 1.2 is out at its own place and for the token before it.
    torch.testing.assert_close(influence([0.1, 1.2]), torch.tensor([[math.exp(0.1), 1.0]]))


def test_a_punished_runaway_token_is_not_punished_further():
    # Ratio e^2 = 7.4 > 6: it leaves its own sum, the token after it would raise the influence to e^0.15.
    scaled_up = influence([2.0, 0.3], advantage=[1.0, 1.0])[0, 0].item()
    punished = influence([2.0, 0.3], advantage=[-1.0, 1.0])[0, 0].item()
    unguarded = influence([2.0, 0.3], advantage=[-1.0, 1.0], safety_threshold=None)[0, 0].item()
    assert scaled_up == unguarded == pytest.approx(math.exp(0.15))
    assert punished == 1.0


def test_influence_has_no_gradient():
    log_ratio = torch.zeros(1, 2, requires_grad=True)
    out = future_influence(
        log_ratio,
        torch.ones(1, 2),
        ones(1, 2),
        gamma=0.5,
        clip=0.2,
        high_only=True,
        dual_clip=3.0,
        safety_threshold=None,
    )
    assert not out.requires_grad


def test_scaling_as_published_and_centred():
    advantage, factor = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.2, 1.0]])
    torch.testing.assert_close(scale_by_influence(advantage, factor), torch.tensor([[4.4, -2.0]]))
    torch.testing.assert_close(scale_by_influence(advantage, factor, centred=True), torch.tensor([[2.4, -1.0]]))
    torch.testing.assert_close(scale_by_influence(advantage, factor, weight=0.5), torch.tensor([[3.2, -1.5]]))
    assert torch.equal(scale_by_influence(advantage, factor, weight=0.0), advantage)


def test_wrong_input_is_refused_in_one_line():
    reward, prompt, mask, branch_reward, branch_root, branch_position = random_tree(0)
    with pytest.raises(ValueError, match=r"branch_root must lie in \[0, 12\), got values from 12 to 12"):
        dual_group_advantage(reward, prompt, mask, branch_reward, torch.full_like(branch_root, 12), branch_position)
    with pytest.raises(ValueError, match=r"branch_position must lie in \[0, 9\)"):
        dual_group_advantage(reward, prompt, mask, branch_reward, branch_root, branch_position + 9)
    with pytest.raises(ValueError, match=r"branch_root must be int64, got torch.float32"):
        dual_group_advantage(reward, prompt, mask, branch_reward, branch_root.float(), branch_position)
    with pytest.raises(ValueError, match="vectors of branches must be 1-D and equally long"):
        dual_group_advantage(reward, prompt, mask, branch_reward[:3], branch_root, branch_position)
    with pytest.raises(ValueError, match="reward must be finite"):
        dual_group_advantage(reward * math.nan, prompt, mask, *no_branches())
    with pytest.raises(ValueError, match=r"root_reward must be \[B\] = \[12\], got \[3\]"):
        dual_group_advantage(reward[:3], prompt, mask, *no_branches())
    with pytest.raises(ValueError, match="high_only has no effect without a clip"):
        influence([0.0], clip=0.0, high_only=True)
    with pytest.raises(ValueError, match="dual_clip must be a finite number > 1, got 1"):
        influence([0.0], dual_clip=1.0)
    with pytest.raises(ValueError, match="weight must be a finite number >= 0, got -1"):
        scale_by_influence(torch.ones(1, 1), torch.ones(1, 1), weight=-1)
