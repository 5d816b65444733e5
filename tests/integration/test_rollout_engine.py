"""The tool loop over the real engine: what comes out depends on weights, tasks and seeds, never on the clock."""

from __future__ import annotations

import importlib.util
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from appo_lightning.rollout.episode import Prefix
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.loop import RolloutLoop
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
MAX_LENGTH = LIMITS.max_prompt_tokens + LIMITS.max_response_tokens


class RandomlyLate(StatelessTool):
    """Answers with a function of its argument, at a time of its own."""

    name = "search"

    def __init__(self, timing: random.Random) -> None:
        self._timing = timing

    def run(self, argument: str, task: Task) -> str:
        time.sleep(self._timing.choice([0.0, 0.002, 0.02, 0.08]))
        return f"about {argument[:5]} of {task.id}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_checkpoint(Path(tmp_path_factory.mktemp("policy")), hidden_size=32, num_layers=1)


@pytest.fixture(scope="module")
def world(checkpoint: str) -> Iterator[tuple[VLLMSampler, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # Fewer slots than rollouts: they also wait for each other.
    sampler = VLLMSampler(kv_cache_mb=64, max_num_seqs=8)
    sampler.start(checkpoint, tokenizer, max_length=MAX_LENGTH)
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


@pytest.mark.parametrize("fault", ["raises", "samples nothing"])
def test_a_fresh_engine_finishes_what_a_broken_one_began(
    world: tuple[VLLMSampler, Any], checkpoint: str, fault: str
) -> None:
    sampler, tokenizer = world
    starts = prefixes(tokenizer)
    whole = rolled(world, starts, trial=0)
    policy = AutoModelForCausalLM.from_pretrained(checkpoint)
    steps = 0

    def break_engine() -> None:
        engine: Any = sampler._engine
        step = engine.step

        def broken_step() -> Any:
            nonlocal steps
            steps += 1
            if steps <= 40:
                return step()
            if fault == "raises":
                raise RuntimeError("out of memory")
            time.sleep(0.01)
            return []

        engine.step = broken_step

    def restart() -> None:
        sampler.close()
        sampler.start(checkpoint, tokenizer, max_length=MAX_LENGTH)
        sampler.load_weights(policy.named_parameters())

    break_engine()
    limits = replace(LIMITS, stall_timeout_s=2.0)
    loop = RolloutLoop(sampler, [RandomlyLate(random.Random(5))], tokenizer, limits, restart)
    with pytest.warns(
        UserWarning, match="vLLM failed to step: RuntimeError" if fault == "raises" else "no token for 2"
    ):
        found = loop.run(starts, policy_version=0)
    assert_same(found, whole)
    assert loop.statistics.restarts == 1
