"""The pure functions reproduce the published implementation: outputs, and gradients where it gives them."""

import json
from pathlib import Path

import pytest
import torch

from appo_lightning.algorithm import (
    branching_score,
    clipped_policy_loss,
    dual_group_advantage,
    future_influence,
    future_value,
    gamma_from_half_life,
    scale_by_influence,
    select_branch_points,
)

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "appo_reference_vectors.json").read_text())


def cases(name):
    return pytest.mark.parametrize("case", VECTORS[name], ids=range(len(VECTORS[name])))


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def boolean(values):
    return torch.tensor(values).bool()


@cases("future_value")
def test_future_value(case):
    log_ratio, mask = double(case["log_ratio"]), boolean(case["mask"])
    ours = future_value(log_ratio, mask, gamma=case["gamma"], clip=case["clip"])
    torch.testing.assert_close(ours, double(case["out"]), rtol=0, atol=1e-12)
    single = future_value(log_ratio.float(), mask, gamma=case["gamma"], clip=case["clip"])
    torch.testing.assert_close(single.double(), ours, rtol=0, atol=1e-6)


@cases("dual_group_advantage")
def test_dual_group_advantage(case):
    rewards, expected, mask = double(case["rewards"]), double(case["out"]), boolean(case["mask"])
    roots = [row for row, kind in enumerate(case["kinds"]) if kind == "init"]
    prompts = sorted(set(case["prompts"]))
    ours = dual_group_advantage(
        rewards[roots],
        torch.tensor([prompts.index(case["prompts"][row]) for row in roots]),
        mask[roots],
        rewards[[branch["branch"] for branch in case["branches"]]],
        torch.tensor([roots.index(branch["root"]) for branch in case["branches"]]),
        torch.tensor([branch["position"] for branch in case["branches"]]),
        normalise_std=case["normalise_std"],
    )
    # The published numbers are float32.
    torch.testing.assert_close(ours, expected[roots], rtol=0, atol=1e-6)


@cases("branch_selection")
def test_branch_selection(case):
    mask, blank = boolean(case["mask"]), boolean(case["blank"])
    gain = double(case["current_logprob"]) - double(case["behaviour_logprob"])
    scored = branching_score(double(case["entropy"]), gain, mask, gamma=case["gamma"], clip=case["clip"])
    prompts = [sorted(set(case["prompt"])).index(prompt) for prompt in case["prompt"]]
    ours = select_branch_points(
        scored.score,
        scored.entropy_z,
        scored.future_value_z,
        mask & ~blank,
        torch.tensor(prompts),
        count=case["budget"],
        scope="prompt",
    )
    published = [
        (point["row"], point["position"], point["score"])
        for point in case["selected"]
        if point["score"] > 0 and scored.entropy_z[point["row"], point["position"]] > 0
    ]
    assert [(point.root, point.position) for point in ours] == [(row, position) for row, position, _ in published]
    assert [point.score for point in ours] == pytest.approx([score for *_, score in published], abs=2e-5)
    assert len(published) == 2 * case["budget"]


@cases("future_aware_policy_loss")
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 1e-6)], ids=str)
def test_future_aware_policy_loss_and_its_gradient(case, dtype, atol):
    options = case["options"]
    old, advantage = double(case["old_logprob"]).to(dtype), double(case["advantage"]).to(dtype)
    logprob = double(case["logprob"]).to(dtype).requires_grad_()
    mask = boolean(case["mask"])
    influence = future_influence(
        logprob - old,
        advantage,
        mask,
        gamma=gamma_from_half_life(options["decay_rate"]),
        clip=options["future_kl_clip_ratio"],
        high_only=options["future_kl_clip_high_only"],
        dual_clip=options["clip_ratio_c"],
        safety_threshold=options["safety_thresh"],
    )
    ours = clipped_policy_loss(
        logprob,
        old,
        scale_by_influence(advantage, influence, weight=options["future_kl_weight"]),
        mask,
        clip_low=options["clip_ratio_low"],
        clip_high=options["clip_ratio_high"],
        dual_clip=options["clip_ratio_c"],
    )
    ours.loss.backward()
    assert ours.loss.item() == pytest.approx(case["loss"], abs=atol)
    torch.testing.assert_close(logprob.grad, double(case["grad"]).to(dtype), rtol=0, atol=atol)
    # The published denominators carry a 1e-8.
    for name in ("clip_fraction", "lower_clip_fraction", "approx_kl"):
        assert float(getattr(ours, name)) == pytest.approx(case[name], abs=max(atol, 1e-8)), name


def test_the_vectors_reach_every_rule_of_the_loss():
    # Else parity would say nothing about dropped responses.
    assert any(case["lower_clip_fraction"] > 0 for case in VECTORS["future_aware_policy_loss"])
    assert any(not any(row) for case in VECTORS["future_aware_policy_loss"] for row in case["grad"])
