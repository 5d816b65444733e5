"""The tool loop over the real engine: what comes out depends on weights, tasks and seeds, never on the clock."""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from appo_lightning.rollout.loop import Prefix, RolloutLimits, RolloutLoop
from appo_lightning.rollout.prompts import build_task
from appo_lightning.rollout.tree import branch_prefixes
from appo_lightning.samplers.vllm import VLLMSampler
from appo_lightning.tasks.lookup import LookupTasks
from appo_lightning.tools.base import StatelessTool
from appo_lightning.types import BranchPoint, RolloutTree, Task, Trajectory
from helpers.training import make_checkpoint

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

LIMITS = RolloutLimits(64, 160, max_tool_calls=4, max_result_tokens=12)


class RandomlyLate(StatelessTool):
    """Answers with a function of its argument, at a time of its own."""

    name = "search"

    def __init__(self, timing: random.Random) -> None:
        self._timing = timing

    def run(self, argument: str, task: Task) -> str:
        time.sleep(self._timing.choice([0.0, 0.002, 0.02, 0.08]))
        return f"about {argument[:5]} of {task.id}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VLLMSampler, Any]]:
    checkpoint = make_checkpoint(Path(tmp_path_factory.mktemp("policy")), hidden_size=32, num_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # Fewer slots than rollouts: they also wait for each other.
    sampler = VLLMSampler(kv_cache_mb=64, max_num_seqs=8)
    sampler.start(checkpoint, tokenizer, max_length=LIMITS.max_prompt_tokens + LIMITS.max_response_tokens)
    yield sampler, tokenizer
    sampler.close()


def prefixes(tokenizer: Any) -> list[Prefix]:
    rows = LookupTasks(size=6)
    tasks = [build_task(rows.row(i), tokenizer, max_prompt_tokens=LIMITS.max_prompt_tokens) for i in range(6)]
    return [Prefix(task, seed=100 * i + n) for i, task in enumerate(tasks) for n in range(6)]


def rolled(world: tuple[VLLMSampler, Any], starts: list[Prefix], trial: int) -> list[Trajectory]:
    """Under another timing and in another order each trial; returned in the order of ``starts``."""
    sampler, tokenizer = world
    timing = random.Random(trial)
    order = list(range(len(starts)))
    timing.shuffle(order)
    loop = RolloutLoop(sampler, [RandomlyLate(timing)], tokenizer, LIMITS)
    mixed = loop.run([starts[i] for i in order], policy_version=0)
    return [mixed[order.index(i)] for i in range(len(starts))]


def what_was_said(trajectories: list[Trajectory]) -> list[tuple[Any, ...]]:
    return [
        (t.response_ids, t.sampled, t.stop_reason, [(c.name, c.argument, c.result, c.error) for c in t.tool_calls])
        for t in trajectories
    ]


def assert_same(first: list[Trajectory], second: list[Trajectory]) -> None:
    assert what_was_said(first) == what_was_said(second)
    for one, other in zip(first, second, strict=True):
        # Batches of other sizes: equal up to the kernels' rounding.
        torch.testing.assert_close(one.behaviour_logprobs, other.behaviour_logprobs, atol=1e-4, rtol=0)


def test_rollouts_are_a_function_of_weights_tasks_and_seeds(world: tuple[VLLMSampler, Any]) -> None:
    starts = prefixes(world[1])
    first = rolled(world, starts, trial=0)
    assert sum(len(t.tool_calls) for t in first) > len(first) / 2
    assert len({tuple(t.response_ids) for t in first}) > len(first) / 2
    for trial in (1, 2):  # the second with a warm prefix cache
        assert_same(rolled(world, starts, trial), first)


def test_branches_are_a_function_of_their_prefix_and_seed(world: tuple[VLLMSampler, Any]) -> None:
    starts = prefixes(world[1])
    roots = rolled(world, starts, trial=0)
    branches = []
    for start, root in zip(starts, roots, strict=True):
        tree = RolloutTree(start.task, [root])
        branches += branch_prefixes(tree, [BranchPoint(0, len(root.response_ids) // 2, 1.0)], keep_token=True, seed=7)
    first = rolled(world, branches, trial=0)
    for branch, trajectory in zip(branches, first, strict=True):
        assert trajectory.response_ids[: len(branch.response_ids)] == branch.response_ids
    for trial in (1, 2):
        assert_same(rolled(world, branches, trial), first)
