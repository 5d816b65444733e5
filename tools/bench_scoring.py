"""Measure what a training step computes besides the policy, against the length of responses: it must grow linearly.

    OMP_NUM_THREADS=1 python tools/bench_scoring.py --json runs/bench_scoring.json

Each row is one function of the package on random rollouts of T tokens; figures are medians of milliseconds. The last
column is the slope of log seconds over log T from the middle length to the longest: 1 is linear, 2 quadratic. Below
some thousands of tokens the fixed cost of a call weighs more.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from appo_lightning.algorithm import (
    branching_score,
    clipped_policy_loss,
    dual_group_advantage,
    future_influence,
    future_value,
    gamma_from_half_life,
    select_branch_points,
)
from appo_lightning.batching import TraceScores, build_batch
from appo_lightning.policy.tree_packing import pack_tree, plan_packs
from appo_lightning.rollout.serialise import trajectories_from_state, trajectories_to_state
from appo_lightning.rollout.tree import BlankTokens, BranchingOptions, plan_branches
from appo_lightning.types import Branch, BranchPoint, RolloutTree, Task, ToolCall, Trajectory
from benchmarking import machine, write_figures

ROOTS, BRANCHES = 4, 4
GAMMA = gamma_from_half_life(64.0)


class Words:
    """A tokenizer without blank tokens."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return "word"


def trajectory(tokens: int, generator: torch.Generator) -> Trajectory:
    """A random response; a tool call every 512 tokens."""
    calls = [ToolCall("search", "x", "y", start, start + 32, True, 0.1) for start in range(256, tokens - 32, 512)]
    sampled = [True] * tokens
    for call in calls:
        sampled[call.output_start : call.output_stop] = [False] * 32
    ids = torch.randint(5, 500, (tokens,), generator=generator).tolist()
    logprobs = torch.randn(tokens, generator=generator).tolist()
    return Trajectory([1] * 32, ids, sampled, logprobs, calls, "eos", 0, "text", reward=float(ids[0]), success=True)


def work(tokens: int) -> dict[str, Callable[[], Any]]:
    """What is measured, on one prompt with its roots and branches."""
    generator = torch.Generator().manual_seed(0)
    roots = [trajectory(tokens, generator) for _ in range(ROOTS)]
    branches = []
    for n, root in enumerate(roots[:BRANCHES]):
        branch = trajectory(tokens, generator)
        half = tokens // 2
        branch.response_ids[:half], branch.sampled[:half] = root.response_ids[:half], [False] * half
        branches.append(Branch(BranchPoint(n, half - 1, 1.0), branch, prefix_length=half))
    trees = [RolloutTree(Task("t", [1] * 32, ()), roots, branches)]
    of_roots, of_branches = (TraceScores(torch.randn(n * tokens), torch.rand(n * tokens)) for n in (ROOTS, BRANCHES))
    base = torch.randn(ROOTS * tokens)

    entropy, gain = (torch.randn(ROOTS, tokens, generator=generator) for _ in range(2))
    mask = torch.tensor([root.sampled for root in roots])
    rewards, prompt = torch.arange(4.0), torch.zeros(ROOTS, dtype=torch.long)
    ranked = branching_score(entropy, gain, mask, gamma=GAMMA, clip=0.2)
    where = torch.arange(BRANCHES), torch.full((BRANCHES,), tokens // 2)
    advantage = dual_group_advantage(rewards, prompt, mask, rewards, *where)
    influence = {"gamma": GAMMA, "clip": 0.2, "high_only": True, "dual_clip": 3.0, "safety_threshold": 6.0}
    clips = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
    is_blank, limits = BlankTokens(Words()), BranchingOptions(ROOTS, ROOTS + BRANCHES)  # type: ignore[arg-type]
    batch = build_batch(trees, old=of_roots, current=of_roots, fallback=[False] * 4, temperature=1.0,
                        branch_old=of_branches, branch_current=of_branches)  # fmt: skip
    rows = batch.sequences

    def plan() -> Any:
        return plan_branches(trees, of_roots, base, limits, noise_floor=0.0, max_response_tokens=2 * tokens,
                             is_blank=is_blank, seed=0)  # fmt: skip

    def pack() -> Any:
        (whole,) = plan_packs(rows.token_ids, rows.lengths, budget=10**9)
        return pack_tree(rows.token_ids[whole.rows], rows.lengths[whole.rows], whole)

    return {
        "future value": lambda: future_value(gain, mask, gamma=GAMMA, clip=0.2),
        "Branching Score": lambda: branching_score(entropy, gain, mask, gamma=GAMMA, clip=0.2),
        "branch points": lambda: select_branch_points(
            ranked.score, ranked.entropy_z, ranked.future_value_z, mask, prompt, count=1, scope="root"
        ),
        "branch plan, all of it": plan,
        "dual-group advantage": lambda: dual_group_advantage(rewards, prompt, mask, rewards, *where),
        "future influence": lambda: future_influence(gain, advantage, mask, **influence),
        "clipped loss": lambda: clipped_policy_loss(0.1 * gain, 0.0 * gain, advantage, mask, **clips),
        "rollouts to a batch": lambda: build_batch(
            trees,
            old=of_roots,
            current=of_roots,
            fallback=[False] * 4,
            temperature=1.0,
            branch_old=of_branches,
            branch_current=of_branches,
        ),
        "packing": pack,
        "to a checkpoint and back": lambda: trajectories_from_state(trajectories_to_state(roots)),
    }


def seconds(function: Callable[[], Any], rounds: int) -> float:
    """Median of some calls."""
    taken = []
    for turn in range(rounds + 1):
        began = time.perf_counter()
        function()
        if turn:  # the first warms up
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if len(options.lengths) < 2:
        parser.error("--lengths: two lengths at least, for a slope")
    torch.set_num_threads(1)
    lengths = sorted(options.lengths)
    table: dict[str, list[float]] = {}
    for tokens in lengths:
        for name, function in work(tokens).items():
            table.setdefault(name, []).append(seconds(function, options.rounds))
    middle = (len(lengths) - 1) // 2
    octaves = math.log(lengths[-1] / lengths[middle])
    print(
        f"{f'ms, {ROOTS} roots, {BRANCHES} branches; T =':36}" + "".join(f"{n:>9,}" for n in lengths) + f"{'slope':>8}"
    )
    slopes = {}
    for name, row in table.items():
        slopes[name] = math.log(row[-1] / row[middle]) / octaves
        print(f"{name:36}" + "".join(f"{1000 * value:9.2f}" for value in row) + f"{slopes[name]:8.2f}")
    figures = {**machine(), "lengths": lengths}
    write_figures(options.json, {**figures, "seconds": table, "slopes": slopes})


if __name__ == "__main__":
    main()
