"""JSON function calls in real runs: the engine's log-probs are the trainer's, over everything that was inserted."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from appo_lightning.cli import main
from appo_lightning.rollout.episode import Prefix
from appo_lightning.rollout.formats.hermes import HermesFormat
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.loop import RolloutLoop
from appo_lightning.rollout.prompts import build_task
from appo_lightning.rollout.tree import branch_prefixes
from appo_lightning.samplers.transformers import TransformersSampler
from appo_lightning.tasks.lookup import LookupTasks
from appo_lightning.types import BranchPoint, RolloutTree, Trajectory
from helpers.chat_templates import DROPS_THOUGHTS, QWEN3
from helpers.scripted import EchoTool
from helpers.training import make_function_checkpoint

CONFIGS = Path(__file__).parents[2] / "configs"
LIMITS = RolloutLimits(1024, 256, max_tool_calls=6, max_result_tokens=24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_function_checkpoint(Path(tmp_path_factory.mktemp("policy")), QWEN3)


def _vllm() -> Any:
    from appo_lightning.samplers.vllm import VLLMSampler

    return VLLMSampler(kv_cache_mb=64, max_num_seqs=8)


WITHOUT_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(TransformersSampler, id="transformers"),
        pytest.param(_vllm, id="vllm", marks=[pytest.mark.engine, WITHOUT_VLLM]),
    ],
)
def world(request: Any, checkpoint: str) -> Iterator[tuple[RolloutLoop, Any, list[Prefix]]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    sampler = request.param()
    sampler.start(checkpoint, tokenizer, max_length=LIMITS.max_prompt_tokens + LIMITS.max_response_tokens)
    tools = [EchoTool()]
    tools[0].text_argument = "query"
    syntax = HermesFormat().bind(tokenizer, tools)
    rows = LookupTasks(size=2)
    tasks = [build_task(rows.row(i), tokenizer, max_prompt_tokens=1024, tools=syntax.prompt_tools) for i in range(2)]
    prefixes = [Prefix(task, seed=10 * i + n) for i, task in enumerate(tasks) for n in range(4)]
    yield RolloutLoop(sampler, tools, tokenizer, LIMITS, syntax=syntax), tokenizer, prefixes
    sampler.close()


def scored(checkpoint: str, trajectory: Trajectory) -> torch.Tensor:
    """Log-probs of the response by one forward pass over the whole sequence."""
    policy = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.tensor([trajectory.prompt_ids + trajectory.response_ids])
    with torch.no_grad():
        logprobs = policy(ids).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[len(trajectory.prompt_ids) - 1 :, 0]


def test_the_engine_saw_what_the_trainer_scores(world: tuple[RolloutLoop, Any, list[Prefix]], checkpoint: str) -> None:
    loop, tokenizer, prefixes = world
    trajectories = loop.run(prefixes, policy_version=0)
    calls = [call for trajectory in trajectories for call in trajectory.tool_calls]
    assert {call.error for call in calls} >= {None, "malformed"}
    blocks = [(a, b) for t in trajectories for a, b in pairwise(t.tool_calls) if a.output_stop == b.output_start]
    assert blocks, "no turn had several calls"
    for trajectory in trajectories:
        sampled = torch.tensor(trajectory.sampled)
        for call in trajectory.tool_calls:
            assert not sampled[call.output_start : call.output_stop].any()
        expected = scored(checkpoint, trajectory)[sampled]
        torch.testing.assert_close(torch.tensor(trajectory.behaviour_logprobs)[sampled], expected, atol=1e-4, rtol=0)
        # A first result stands behind the policy's own end of turn.
        if trajectory.tool_calls:
            assert trajectory.response_ids[trajectory.tool_calls[0].output_start - 1] == tokenizer.eos_token_id


def test_a_branch_goes_on_from_the_tokens_of_its_root(
    world: tuple[RolloutLoop, Any, list[Prefix]], checkpoint: str
) -> None:
    loop, _, prefixes = world
    roots = loop.run(prefixes, policy_version=0)
    starts = []
    for prefix, root in zip(prefixes, roots, strict=True):
        sampled = [n for n, own in enumerate(root.sampled) if own]
        points = [BranchPoint(0, position, 1.0) for position in sampled[:-1:7]]
        starts += branch_prefixes(RolloutTree(prefix.task, [root]), points, keep_token=True, seed=3)
    branches = loop.run(starts, policy_version=0)
    assert len(branches) > 20
    for start, branch in zip(starts, branches, strict=True):
        kept = len(start.response_ids)
        assert branch.response_ids[:kept] == start.response_ids
        assert branch.tool_calls[: len(start.tool_calls)] == start.tool_calls
    longest = max(branches, key=lambda branch: len(branch.tool_calls))
    sampled = torch.tensor(longest.sampled)
    expected = scored(checkpoint, longest)[sampled]
    torch.testing.assert_close(torch.tensor(longest.behaviour_logprobs)[sampled], expected, atol=1e-4, rtol=0)


def arguments(policy: str, output: Path, *more: str, **data: Any) -> list[str]:
    overlay = output.parent / "overlay.yaml"
    overlay.write_text(json.dumps({"data": {"sampler": {"class_path": "TransformersSampler"}, **data}}))
    configs = (CONFIGS / "quickstart" / "appo.yaml", CONFIGS / "data" / "hermes.yaml", overlay)
    options = {
        "model.policy.path": policy,
        "output_dir": str(output),
        "export.path": str(output / "exported"),
        "trainer.max_steps": "2",
        "data.prompts_per_phase": "2",
        "data.prompts_per_mini_batch": "1",
        "data.rollout.max_prompt_tokens": "1400",
        "data.rollout.max_response_tokens": "160",
        "trainer.enable_progress_bar": "false",
    }
    words = [word for config in configs for word in ("--config", str(config))]
    return ["fit", *words, *(word for name, value in options.items() for word in (f"--{name}", value)), *more]


def test_a_policy_trains_with_function_calls(checkpoint: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    # The answers of this policy are all wrong: a reward that differs between them.
    reward = {"class_path": "helpers.training.LetterReward"}
    assert main(arguments(checkpoint, output, reward=reward)) == 0
    events = EventAccumulator(str(next(output.rglob("events.*")).parent))
    events.Reload()
    values = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert max(values["tools/search_calls_per_trajectory"]) > 0
    assert max(values["tools/error_malformed_rate"]) > 0
    # Sampler and trainer agree on every sampled token of the roots, behind any number of inserted ones.
    assert max(values["sync/logprob_gap_max"]) < 1e-3
    before = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    after = AutoModelForCausalLM.from_pretrained(output / "exported").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_template_that_drops_thoughts_stops_the_run_in_one_line(tmp_path: Path, capsys: Any) -> None:
    policy = make_function_checkpoint(tmp_path / "policy", DROPS_THOUGHTS)
    assert main(arguments(policy, tmp_path / "run")) != 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "chat template" in line]
    assert len(lines) == 1
    assert "expected earlier thoughts to stay in the history, found them dropped; give the tokenizer" in lines[0]


def test_a_reward_for_another_format_is_refused(checkpoint: str, tmp_path: Path, capsys: Any) -> None:
    assert main(arguments(checkpoint, tmp_path / "run", "--data.reward.init_args.call_format", "tags")) != 0
    assert "set data.reward.init_args.call_format: hermes" in capsys.readouterr().err
