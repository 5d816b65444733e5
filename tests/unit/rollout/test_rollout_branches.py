"""Claims about continuing a root from a prefix: token ids, call limit, tool state."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest

from appo_lightning.rollout.episode import Prefix
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.loop import RolloutLoop
from appo_lightning.rollout.sessions import EpisodeSession, calls_to_replay, digest_of
from appo_lightning.rollout.tree import branch_prefixes
from appo_lightning.tools.base import Tool
from appo_lightning.types import BranchPoint, RolloutTree, ToolCall, Trajectory
from helpers.scripted import (
    EchoTool,
    ScriptedSampler,
    VariableTool,
    after,
    failing,
    logprob_of,
    make_task,
    scripted_tokenizer,
    text_of,
)
from helpers.tiny import EOS


def run(script: Any, prefixes: list[Prefix], *tools: Tool, **limits: Any) -> list[Trajectory]:
    loop = RolloutLoop(ScriptedSampler(script), list(tools), scripted_tokenizer(), RolloutLimits(**limits))
    return loop.run(prefixes, policy_version=4)


def root_of(script: Any, *tools: Tool, **limits: Any) -> Trajectory:
    return run(script, [Prefix(make_task(), seed=1)], *tools, **limits)[0]


def prefix_of(root: Trajectory, position: int, *, keep_token: bool = True) -> Prefix:
    tree = RolloutTree(make_task(), [root])
    return branch_prefixes(tree, [BranchPoint(0, position, 1.0)], keep_token=keep_token, seed=5)[0]


def prefix_ending(root: Trajectory, text: str) -> Prefix:
    """The prefix whose last token completes the first ``text`` of the response."""
    stop = next(n for n in range(len(root.response_ids) + 1) if text in text_of(root.response_ids[:n]))
    return prefix_of(root, stop - 1)


def stop_of(root: Trajectory, call: int) -> int:
    return root.tool_calls[call].output_stop


TWO_CALLS = after(
    {"?": "<think>hm</think><search>one</search>", "[one]</result>": "<search>two</search>", "": f"ok{EOS}"}
)


# --- prefixes --------------------------------------------------------------------------------------------------------


def test_a_prefix_holds_the_calls_whose_results_lie_inside():
    root = root_of(TWO_CALLS, EchoTool())
    first, second = root.tool_calls
    positions = [first.output_start - 1, first.output_stop, second.output_start - 1, second.output_stop]
    kept = [[call.argument for call in prefix_of(root, position).tool_calls] for position in positions]
    assert kept == [[], ["one"], ["one"], ["one", "two"]]
    assert prefix_of(root, first.output_stop).response_ids == root.response_ids[: first.output_stop + 1]


def test_without_the_token_a_prefix_may_end_with_a_result():
    root = root_of(TWO_CALLS, EchoTool())
    prefix = prefix_of(root, stop_of(root, 0), keep_token=False)
    assert prefix.response_ids == root.response_ids[: stop_of(root, 0)]
    assert [call.argument for call in prefix.tool_calls] == ["one"]


def test_branches_of_one_prompt_have_different_seeds():
    tree = RolloutTree(make_task(), [root_of(TWO_CALLS, EchoTool())])
    points = [BranchPoint(0, position, 1.0) for position in (2, 2, 5)]
    seeds = [prefix.seed for prefix in branch_prefixes(tree, points, keep_token=True, seed=5)]
    assert len(set(seeds)) == 3
    again = [prefix.seed for prefix in branch_prefixes(tree, points, keep_token=True, seed=5)]
    assert again == seeds


def test_a_branch_continues_the_ids_of_the_prefix_and_owns_only_the_rest():
    root = root_of(TWO_CALLS, EchoTool())
    prefix = prefix_ending(root, "<th")
    sampler = ScriptedSampler(after({"": f"ink>no</think>{EOS}"}))
    branch = RolloutLoop(sampler, [EchoTool()], scripted_tokenizer(), RolloutLimits()).run([prefix], policy_version=4)[
        0
    ]
    length = len(prefix.response_ids)
    assert sampler.requests[0].token_ids == root.prompt_ids + root.response_ids[:length]
    assert branch.response_ids[:length] == root.response_ids[:length]
    assert branch.sampled == [False] * length + [True] * (len(branch.response_ids) - length)
    assert branch.behaviour_logprobs == [0.0] * length + [logprob_of(token) for token in branch.response_ids[length:]]
    assert branch.policy_version == 4


def test_a_branch_inside_an_argument_makes_its_own_call():
    tool = EchoTool()
    root = root_of(TWO_CALLS, tool)
    prefix = prefix_ending(root, "<search>on")
    (branch,) = run(after({"<search>on": "ly</search>", "": f"ok{EOS}"}), [prefix], tool)
    assert [call.argument for call in branch.tool_calls] == ["only"]
    assert branch.response_text == "<think>hm</think><search>only</search><result>[only]</result>ok"


def test_a_branch_at_the_closing_tag_makes_the_call_of_the_root_again():
    tool = EchoTool()
    root = root_of(TWO_CALLS, tool)
    prefix = prefix_ending(root, "<search>one</search>")
    (branch,) = run(after({"[one]</result>": f"enough{EOS}"}), [prefix], tool)
    assert tool.calls == ["one", "two", "one"]
    (call,) = branch.tool_calls
    assert (call.output_start, call.output_stop) == (len(prefix.response_ids), stop_of(root, 0))
    assert branch.response_text.endswith("<result>[one]</result>enough")


@pytest.mark.parametrize(("kept", "rest"), [("<search>one</", "search>"), ("<search>one</search", ">")])
def test_a_branch_inside_the_closing_tag_still_calls(kept, rest):
    root = root_of(TWO_CALLS, EchoTool())
    (branch,) = run(after({kept: f"{rest}Zz and on", "": f"ok{EOS}"}), [prefix_ending(root, kept)], EchoTool())
    assert branch.response_text == "<think>hm</think><search>one</search><result>[one]</result>ok"


def test_the_rest_of_a_closing_tag_elsewhere_is_no_call():
    root = root_of(TWO_CALLS, EchoTool())
    script = after({"<search>one</search": " x>", "x>": f"y{EOS}"})
    (branch,) = run(script, [prefix_ending(root, "<search>one</search")], EchoTool())
    assert branch.response_text == "<think>hm</think><search>one</search x>y"
    assert branch.tool_calls == []


def test_the_call_limit_counts_the_calls_of_the_prefix():
    tool = EchoTool()
    root = root_of(TWO_CALLS, tool, max_tool_calls=2)
    prefix = prefix_of(root, stop_of(root, 0))
    tool.calls.clear()
    (branch,) = run(after({"": "<search>more</search>"}), [prefix], tool, max_tool_calls=2)
    assert tool.calls == ["more"]
    assert [call.error for call in branch.tool_calls] == [None, None, "limit"]
    assert branch.stop_reason == "call_limit"


def test_the_response_budget_counts_the_prefix():
    root = root_of(TWO_CALLS, EchoTool())
    prefix = prefix_of(root, stop_of(root, 0))
    budget = len(prefix.response_ids) + 7
    (branch,) = run(after({"": "x" * 99}), [prefix], EchoTool(), max_response_tokens=budget)
    assert len(branch.response_ids) == budget
    assert branch.num_sampled == 7
    assert branch.stop_reason == "length"


# --- tool state ------------------------------------------------------------------------------------------------------


def code(*lines: str) -> str:
    return f"<python>{''.join(lines)}</python>"


STATEFUL = after(
    {"?": code("x=1"), "result>1</result>": code("y=2"), "result>2</result>": code("x=3"), "": f"done{EOS}"}
)


def test_a_branch_sees_the_variables_of_its_prefix_and_no_later_ones():
    tool = VariableTool()
    root = root_of(STATEFUL, tool)
    assert [call.result for call in root.tool_calls] == ["1", "2", "3"]
    prefix = prefix_of(root, stop_of(root, 0))
    script = after({"": code("y"), "no y</result>": code("x"), "<result>1</result>": code("y")})
    (branch,) = run(script, [prefix], tool)
    assert [call.result for call in branch.tool_calls[1:3]] == ["no y", "1"]
    assert tool.used[-1].calls == ["x=1", "y", "x"]


def test_root_and_branches_never_share_a_session():
    tool = VariableTool()
    root = root_of(STATEFUL, tool)
    prefixes = [prefix_of(root, stop_of(root, 1)), prefix_of(root, stop_of(root, 1))]
    prefixes[1].seed += 1
    script = after({"": code("x=9"), "<result>9</result>": code("x"), "9</result><python>x</python>": "unused"})
    run(script, prefixes, tool, max_tool_calls=4)
    assert [session.calls for session in tool.used] == [
        ["x=1", "y=2", "x=3"],
        ["x=1", "y=2", "x=9", "x"],
        ["x=1", "y=2", "x=9", "x"],
    ]
    assert tool.used[0].values == {"x": "3", "y": "2"}
    assert all(session.closed for session in tool.sessions)


def test_calls_that_failed_in_the_root_are_repeated_for_their_side_effects():
    tool = VariableTool()
    root = root_of(after({"?": code("del"), "delete</result>": code("x=1"), "": f"ok{EOS}"}), tool)
    assert [call.error for call in root.tool_calls] == ["error", None]
    (branch,) = run(after({"": code("deleted"), "yes</result>": f"ok{EOS}"}), [prefix_of(root, stop_of(root, 1))], tool)
    assert branch.tool_calls[-1].result == "yes"
    assert tool.used[-1].calls == ["del", "x=1", "deleted"]


def test_a_state_lost_to_a_timeout_in_the_root_is_lost_in_the_branch_too():
    tool = VariableTool(timeout_s=0.1)
    script = after(
        {
            "?": code("x=1"),
            "result>1</result>": code("hang"),
            "seconds</result>": code("y=2"),
            "result>2</result>": code("x"),
            "no x</result>": f"ok{EOS}",
        }
    )
    root = root_of(script, tool, max_tool_calls=9)
    assert [call.error for call in root.tool_calls] == [None, "timeout", None, None]
    assert root.tool_calls[3].result == "no x"
    prefix = prefix_of(root, stop_of(root, 2))
    (branch,) = run(after({"": code("x"), "no x</result>": f"ok{EOS}"}), [prefix], tool, max_tool_calls=9)
    assert branch.tool_calls[-1].result == "no x"
    assert tool.used[-1].calls == ["y=2", "x"]


def test_a_branch_after_its_own_timeout_starts_empty():
    tool = VariableTool(timeout_s=0.1)
    root = root_of(STATEFUL, tool)
    script = after({"": code("hang"), "seconds</result>": code("x"), "no x</result>": f"ok{EOS}"})
    (branch,) = run(script, [prefix_of(root, stop_of(root, 0))], tool, max_tool_calls=9)
    assert [(call.result, call.error) for call in branch.tool_calls[2:]] == [("no x", None)]


def recorded(argument: str, error: Any = None, name: str = "python") -> ToolCall:
    return ToolCall(name, argument, "", 0, 0, error is None, 0.0, error)


def test_calls_to_replay_are_those_that_made_the_state():
    calls = [
        recorded("a"),
        recorded("b", "timeout"),
        recorded("c", "error"),
        recorded("q", name="search"),
        recorded("d", "malformed"),
        recorded("e", "empty"),
        recorded("f", "limit"),
    ]
    assert [call.argument for call in calls_to_replay(calls, "python")] == ["c", "e"]


def test_each_repeated_call_has_the_time_limit_of_a_call():
    tool = VariableTool(timeout_s=2.0)
    session = EpisodeSession(tool, make_task(), [recorded("x=1"), recorded("y=2")])
    assert session.timeout_s == pytest.approx(1.1 * 2.0 * 3)
    assert session.call("x") == "1"
    assert session.timeout_s == pytest.approx(1.1 * 2.0)


def test_a_state_that_cannot_be_restored_is_said_not_guessed():
    class Forgetful(VariableTool):
        def open(self, task):
            session = super().open(task)
            session.call = lambda argument: (_ for _ in ()).throw(failing("out of memory"))
            return session

    session = EpisodeSession(Forgetful(), make_task(), [recorded("x=1")])
    with pytest.raises(type(failing("")), match="the state of earlier calls is lost: out of memory") as caught:
        session.call("x")
    assert caught.value.kind == "timeout"


def test_stateless_tools_repeat_nothing():
    tool = EchoTool()
    root = root_of(TWO_CALLS, tool)
    tool.calls.clear()
    run(
        after({"": f"<search>new</search>{EOS}", "[new]</result>": f"ok{EOS}"}),
        [prefix_of(root, stop_of(root, 0))],
        tool,
    )
    assert tool.calls == ["new"]


@pytest.fixture
def interpreter():
    python = pytest.importorskip("appo_lightning.tools.python")
    tool = python.PythonTool(timeout_s=20.0)
    yield tool
    tool.close()


def test_a_python_branch_has_the_variables_of_its_prefix_and_no_later_ones(interpreter):
    script = after(
        {
            "?": code("import random\nseen = [random.random()]"),
            "no result</result>": code("seen.append(2)\nprint(len(seen), 'seen')"),
            "2 seen</result>": code("later = 1\nprint(len(seen), 'kept')"),
            "kept</result>": f"ok{EOS}",
        }
    )
    root = root_of(script, interpreter)
    assert [(call.result, call.error) for call in root.tool_calls] == [
        ("no result", "empty"),
        ("2 seen", None),
        ("2 kept", None),
    ]
    asks = {
        "": code("print(seen[0], len(seen), 'later' in globals())"),
        "True</result>": f"ok{EOS}",
        "False</result>": f"ok{EOS}",
    }
    prefixes = [prefix_of(root, stop_of(root, call)) for call in (0, 1)]
    first, second = run(after(asks), prefixes, interpreter)
    draw, length, later = first.tool_calls[-1].result.split()
    assert (length, later) == ("1", "False")
    assert second.tool_calls[-1].result == f"{draw} 2 False"


# Repeating what was not as it seemed


class DriftingTool(VariableTool):
    """Answers "clock" differently each time, as a program that prints the time does."""

    def open(self, task):
        session, ticks = super().open(task), self.ticks
        answer = session.call

        def call(argument):
            return f"tick {next(ticks)}" if argument == "clock" else answer(argument)

        session.call = call
        return session

    ticks = itertools.count()


@pytest.mark.parametrize(
    ("first", "matches"),
    [("x=1", True), ("del", True), ("clock", False)],
    ids=["the same answer", "the same failure", "another answer"],
)
def test_a_repeated_call_that_answers_otherwise_marks_the_branch(first, matches):
    script = after({"?": code(first), "</result>": code("y=2"), "y</result>": f"ok{EOS}"})
    tool = DriftingTool()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said about a root
        root = root_of(script, tool, max_tool_calls=1)
    assert [call.state_matches for call in root.tool_calls][:1] == [None]
    assert len(root.tool_calls[0].digest) == 16
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        (branch,) = run(
            after({"": code("y=2"), "</result>": f"ok{EOS}"}),
            [prefix_of(root, stop_of(root, 0))],
            tool,
            max_tool_calls=2,
        )
    assert branch.tool_calls[0].digest == root.tool_calls[0].digest
    assert branch.tool_calls[1].state_matches is matches
    assert ["did not do what it did in its root" in str(warning.message) for warning in said] == [True] * (not matches)


def test_what_was_cut_for_the_policy_is_compared_as_a_whole():
    tool = DriftingTool()
    call = recorded("x=1")
    call.digest = digest_of("x" * 10_000)
    session = EpisodeSession(tool, make_task(), [call])
    with pytest.warns(UserWarning, match="did not do what it did in its root"):
        session.call("x")
    assert session.state_matches is False
    assert digest_of("x" * 10_000) != digest_of("x" * 9_999)


def test_root_and_branches_of_a_python_session_never_see_each_other(interpreter):
    script = after(
        {
            "?": code("before = 1\nopen('file', 'w').write('root')"),
            "4</result>": code("before = after = 2\nopen('file', 'w').write('later')"),
            "5</result>": f"ok{EOS}",
        }
    )
    root = root_of(script, interpreter)
    assert [call.result for call in root.tool_calls] == ["4", "5"]
    asks = {"": code("before, 'after' in globals(), open('file').read()"), "</result>": f"ok{EOS}"}
    changes = {
        "": code("before = 3; open('file', 'w').write('branch')"),
        "6</result>": code("before, open('file').read()"),
    }
    start = prefix_of(root, stop_of(root, 0))
    (first,) = run(after(asks), [start], interpreter)
    (second,) = run(after({**changes, "branch')</result>": f"ok{EOS}"}), [start], interpreter)
    (third,) = run(after(asks), [start], interpreter)
    assert first.tool_calls[-1].result == third.tool_calls[-1].result == "(1, False, 'root')"
    assert second.tool_calls[-1].result == "(3, 'branch')"
    assert [call.state_matches for call in (first.tool_calls[-1], second.tool_calls[-1])] == [True, True]
