"""The comparison with TRL: both sides are told to do the same, and ours does it. TRL itself is not needed here."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from appo_lightning.lightning_cli import find_stage
from appo_lightning.rollout.episode import Prefix
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.loop import RolloutLoop
from appo_lightning.rollout.prompts import build_task
from appo_lightning.samplers.transformers import TransformersSampler
from appo_lightning.types import TaskRow
from helpers.parsed import ParsedOnly

ROOT = Path(__file__).parents[2]
PARTS = ROOT / "tools" / "bench_trl"
sys.path[:0] = [str(ROOT / "tools"), str(PARTS)]

import agreement  # noqa: E402
import appo_parts  # noqa: E402
import policy  # noqa: E402
import shared  # noqa: E402

import bench_trl  # noqa: E402

CASES = list(bench_trl.CASES)


def test_help_works():
    script = str(ROOT / "tools" / "bench_trl.py")
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "--cases" in done.stdout


@pytest.mark.parametrize("case", CASES)
def test_our_configuration_parses(case, monkeypatch):
    monkeypatch.syspath_prepend(PARTS)
    arguments = ["--config", str(PARTS / "appo" / "base.yaml"), "--config", str(PARTS / "appo" / f"{case}.yaml")]
    parsed = ParsedOnly(find_stage(arguments), "fit", arguments, execute=False).config["fit"].as_dict()
    # What the parser makes of the files is what the agreement reads in them.
    assert agreement.appo_workload(parsed) == agreement.workload(case)


@pytest.mark.parametrize("case", CASES)
def test_both_configurations_describe_the_same_step(case):
    ours, theirs = agreement.read_appo(case), agreement.read_trl(case)
    assert agreement.appo_workload(ours) == agreement.trl_workload(theirs)


@pytest.mark.parametrize(
    ("name", "value"), [("num_generations", 4), ("max_completion_length", 64), ("learning_rate", 1e-5)]
)
def test_a_difference_between_the_configurations_is_refused(name, value, monkeypatch):
    different = agreement.read_trl("tiny") | {name: value}
    monkeypatch.setattr(agreement, "read_trl", lambda case: different)
    with pytest.raises(ValueError, match=r"must describe the same step, found .* and "):
        agreement.workload("tiny")


def test_expected_counts_of_the_case_with_tools():
    # 4 prompts x 8; 4 turns of 32 sampled tokens; 3 results of 8 tokens: 4 * 32 + 3 * 8 = 152
    assert bench_trl.expected_counts(agreement.workload("tools")) == {
        "sequences": 32,
        "prompt_tokens": 512,
        "response_tokens": 4864,
        "sampled_tokens": 4096,
        "tool_calls": 96,
        "tool_failures": 0,
    }


def test_calls_of_a_step_take_the_same_time_in_sum(monkeypatch):
    slept = []
    monkeypatch.setattr(shared.time, "sleep", slept.append)
    tool = shared.SlowTool(calls_per_step=96)
    for _ in range(2 * 96):
        tool()
    assert sorted(slept[:96]) == sorted(slept[96:]) == pytest.approx([0.05 + 0.25 * n / 95 for n in range(96)])
    assert slept[:96] != sorted(slept[:96])


def test_the_reward_reads_words():
    assert shared.even_words(" w1 w2 w4 x6 w\u00b2<result>found w8</result>") == 3 / 4


@pytest.fixture(scope="module")
def speaker(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("speaker")
    policy.save(folder, "tools", turn_tokens=bench_trl.TURN_TOKENS)
    return folder


@pytest.fixture(scope="module")
def rollouts(speaker):
    """Tokenizer, and two rollouts of the policy that speaks in turns."""
    tokenizer = policy.build_tokenizer(policy.SHAPES["tools"].words)
    work = agreement.workload("tools")
    sampler = TransformersSampler()
    sampler.start(str(speaker), tokenizer, max_length=bench_trl.PROMPT_TOKENS + work.response_tokens)
    limits = RolloutLimits(bench_trl.PROMPT_TOKENS, work.response_tokens, max_tool_calls=work.tool_calls)
    loop = RolloutLoop(sampler, [appo_parts.Wait(calls_per_step=6)], tokenizer, limits)
    question = " w1 w2 w3 w4 w5 w6 w7 w8"
    task = build_task(TaskRow("t", [{"role": "user", "content": question}], ()), tokenizer, max_prompt_tokens=16)
    return tokenizer, loop.run([Prefix(task, seed=0), Prefix(task, seed=1)], policy_version=0)


def test_the_policy_calls_three_times_and_ends_with_the_budget(rollouts):
    _, trajectories = rollouts
    for trajectory in trajectories:
        assert (len(trajectory.prompt_ids), len(trajectory.response_ids), trajectory.num_sampled) == (16, 152, 128)
        assert [call.output_start for call in trajectory.tool_calls] == [32, 72, 112]
        assert all(call.succeeded for call in trajectory.tool_calls)
    assert trajectories[0].response_ids != trajectories[1].response_ids


def test_transformers_reads_the_same_calls_as_we_do(rollouts):
    """TRL finds calls by the tokenizer's own template, turn by turn, the turns before as the prefix."""
    tokenizer, (trajectory, _) = rollouts
    begin = 0
    for call in trajectory.tool_calls:
        prefix = trajectory.prompt_ids + trajectory.response_ids[:begin]
        message = tokenizer.parse_response(trajectory.response_ids[begin : call.output_start], prefix=prefix)
        ticket = call.argument.removeprefix("ticket ")
        function = {"name": "wait", "arguments": {"ticket": ticket}}
        assert message["tool_calls"] == [{"type": "function", "function": function}]
        begin = call.output_stop


def test_the_template_writes_results_as_our_loop_does(rollouts):
    """TRL takes a result's tokens from the template: what a tool message adds to a conversation."""
    tokenizer, (trajectory, _) = rollouts
    call = {"type": "function", "function": {"name": "wait", "arguments": {}}}
    conversation = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    result = {"role": "tool", "name": "wait", "content": shared.RESULT}

    def ids(messages, **options):
        return tokenizer.apply_chat_template(messages, return_dict=False, **options)

    before, after = ids(conversation), ids([*conversation, result], add_generation_prompt=True)
    first = trajectory.tool_calls[0]
    assert after[: len(before)] == before
    assert after[len(before) :] == trajectory.response_ids[first.output_start : first.output_stop]


def test_the_random_policy_cannot_end_a_response():
    shape = dataclasses.replace(policy.SHAPES["tiny"], words=16)
    tokenizer = policy.build_tokenizer(shape.words)
    model = policy.build_policy(shape, tokenizer, turn_tokens=0)
    tokens = torch.randint(len(tokenizer), (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        probabilities = model(tokens).logits.softmax(-1)
    assert float(probabilities[..., tokenizer.eos_token_id].max()) < 1e-10
    assert float(probabilities.max()) < 0.5  # random otherwise


def test_our_side_does_a_step_at_each_turn(tmp_path):
    """The referee's protocol and our side of it, for real; the work is counted by the contestant itself."""
    work = agreement.workload("tiny")
    (tmp_path / "policy").mkdir()
    policy.save(tmp_path / "policy", "tiny", turn_tokens=0)
    ours = bench_trl.start("tiny", "appo-transformers", tmp_path, Path("unused"), threads=1, steps=2)
    seconds = bench_trl.measure([ours], work, warm_up=0, rounds=1)
    ours.stop()
    assert ours.versions["torch"] == torch.__version__
    assert len(seconds["appo-transformers"]) == 1
