"""Tools that take JSON arguments, called by a policy through the tool loop."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from appo_lightning.callbacks.tripwires import has_empty_call, has_repeated_call
from appo_lightning.rollout.episode import Prefix
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.loop import RolloutLoop
from appo_lightning.tools.cassette import CassetteTool
from appo_lightning.tools.function import FunctionTool
from helpers.scripted import ScriptedSampler, after, make_task, scripted_tokenizer
from helpers.tiny import EOS


def add(a: int, b: int = 1) -> int:
    """Adds two numbers."""
    return a + b


WRONG_THEN_RIGHT = after(
    {"?": '<add>{"a": "many"}</add>', "</result>": '<add>{"a": 40, "b": 2}</add>', "42</result>": f"ok{EOS}"}
)


def rollout_of(policy, tool):
    loop = RolloutLoop(ScriptedSampler(policy), [tool], scripted_tokenizer(), RolloutLimits())
    [rollout] = loop.run([Prefix(make_task(), seed=1)], policy_version=0)
    return rollout


def calls_of(tool):
    calls = rollout_of(WRONG_THEN_RIGHT, tool).tool_calls
    return [(call.argument, call.result, call.error) for call in calls]


def check(calls, problem):
    (first, told, error), right = calls
    assert (first, error) == ('{"a": "many"}', "malformed")
    assert told.startswith("malformed: ")
    assert problem in told
    assert right == ('{"a": 40, "b": 2}', "42", None)


def test_a_policy_reads_what_was_wrong_with_its_call_of_a_function():
    check(calls_of(FunctionTool(add)), "a: Input should be a valid integer")


@pytest.mark.parametrize(("text", "suspicious"), [("<add></add>", True), ("so </add>", False)])
def test_calls_that_a_function_refuses_are_suspicious_and_those_that_never_reached_it_are_not(text, suspicious):
    rollout = rollout_of(after({"": text}), FunctionTool(add))
    refused = [call for call in rollout.tool_calls if call.error == "malformed"]
    assert len(refused) > 2
    assert (has_empty_call(rollout), has_repeated_call(rollout)) == (suspicious, suspicious)


def test_a_recorded_tool_reads_the_same(tmp_path):
    path = str(tmp_path / "calls.sqlite")
    recorded = calls_of(CassetteTool(FunctionTool(add), path))
    assert calls_of(CassetteTool(FunctionTool(add), path, "replay")) == recorded
    check(recorded, "a: Input should be a valid integer")


def test_a_policy_reads_what_was_wrong_with_its_call_of_an_mcp_server():
    pytest.importorskip("mcp", reason="an optional extra: pip install 'appo-lightning[mcp]'")
    from appo_lightning.tools.mcp import MCPServer, MCPTool

    server = Path(__file__).parents[2] / "helpers" / "mcp_server.py"
    tool = MCPTool(MCPServer(command=(sys.executable, str(server))), "add")
    try:
        check(calls_of(tool), "a: 'many' is not of type 'integer'")
    finally:
        tool.close()
