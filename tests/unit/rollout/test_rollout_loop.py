"""Claims about the tool loop: what becomes part of a trajectory, what counts, what ends it."""

from __future__ import annotations

import itertools
import random
import threading
import time
from typing import Any

import pytest

from appo_lightning.errors import ConfigurationError, DataError, SamplerError
from appo_lightning.rollout import loop as rollout_loop
from appo_lightning.rollout.episode import Prefix
from appo_lightning.rollout.formats import plain_text
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.loop import RolloutLoop
from appo_lightning.tokens import encode_text
from appo_lightning.tools.base import Tool
from appo_lightning.types import ToolCall, Trajectory
from helpers.scripted import (
    EchoTool,
    FixedTool,
    HangingTool,
    ScriptedSampler,
    after,
    failing,
    ids_of,
    logprob_of,
    make_task,
    scripted_tokenizer,
    text_of,
)
from helpers.tiny import EOS

ONE_CALL = after({"?": "<think>hm</think><search>a b</search>", "": f"<answer>7</answer>{EOS}"})


def roll(
    sampler: ScriptedSampler, tools: list[Tool], *, prefixes: list[Prefix] | None = None, **limits: Any
) -> list[Trajectory]:
    loop = RolloutLoop(sampler, tools, scripted_tokenizer(), RolloutLimits(**limits))
    return loop.run(prefixes or [Prefix(make_task(), seed=1)], policy_version=3)


def roll_one(script: Any, *tools: Tool, **limits: Any) -> Trajectory:
    return roll(ScriptedSampler(script), list(tools), **limits)[0]


def summary(call: ToolCall) -> tuple[str, str, str, str | None]:
    return call.name, call.argument, call.result, call.error


# --- one trajectory --------------------------------------------------------------------------------------------------


def test_a_call_and_its_answer_make_a_trajectory():
    trajectory = roll_one(ONE_CALL, EchoTool())
    sampled = "<think>hm</think><search>a b</search>"
    result = "<result>[a b]</result>"
    answer = f"<answer>7</answer>{EOS}"
    assert trajectory.response_ids == ids_of(sampled) + ids_of(result) + ids_of(answer)
    assert trajectory.prompt_ids == ids_of("t?")
    assert trajectory.response_text == sampled + result + "<answer>7</answer>"
    assert trajectory.stop_reason == "eos"
    assert trajectory.policy_version == 3
    assert trajectory.reward is None
    (call,) = trajectory.tool_calls
    assert summary(call) == ("search", "a b", "[a b]", None)
    assert call.succeeded
    assert (call.output_start, call.output_stop) == (len(ids_of(sampled)), len(ids_of(sampled + result)))
    assert text_of(trajectory.response_ids[call.output_start : call.output_stop]) == result


def test_only_sampled_tokens_are_sampled_and_have_logprobs():
    trajectory = roll_one(ONE_CALL, EchoTool())
    (call,) = trajectory.tool_calls
    for position, token in enumerate(trajectory.response_ids):
        injected = call.output_start <= position < call.output_stop
        assert trajectory.sampled[position] is not injected
        assert trajectory.behaviour_logprobs[position] == (0.0 if injected else logprob_of(token))
    assert trajectory.num_sampled == len(trajectory.response_ids) - (call.output_stop - call.output_start)


def test_sampled_ids_are_never_tokenised_again():
    # Letter by letter, as no tokenizer would write it.
    letters = [token for letter in "<think>the quick</think><search>the city</search>" for token in ids_of(letter)]
    assert letters != ids_of(text_of(letters))
    answer = [token for letter in "<answer>7</answer>" for token in ids_of(letter)] + ids_of(EOS)
    sampler = ScriptedSampler(after({"?": letters, "": answer}))
    trajectory = roll(sampler, [EchoTool()])[0]
    (call,) = trajectory.tool_calls
    assert trajectory.response_ids[: call.output_start] == letters
    assert trajectory.response_ids[call.output_stop :] == answer
    assert sampler.requests[1].token_ids == ids_of("t?") + trajectory.response_ids[: call.output_stop]


def test_the_token_that_closes_the_call_keeps_what_it_carries():
    script = after({"?": "<search>a</search>\n", "": f"ok{EOS}"})
    trajectory = roll_one(script, EchoTool())
    assert trajectory.response_text == "<search>a</search>\n<result>[a]</result>ok"
    assert trajectory.tool_calls[0].argument == "a"


def test_a_response_without_calls_ends_at_eos():
    trajectory = roll_one(after({"": f"just this{EOS}"}), EchoTool())
    assert (trajectory.response_text, trajectory.stop_reason, trajectory.tool_calls) == ("just this", "eos", [])


def test_a_tool_that_does_not_exist_is_only_text():
    trajectory = roll_one(after({"": f"<calc>1</calc>{EOS}"}), EchoTool())
    assert trajectory.tool_calls == []


def test_without_tools_nothing_stops_the_response():
    trajectory = roll_one(after({"": f"<search>a</search>b{EOS}"}))
    assert trajectory.response_text == "<search>a</search>b"


@pytest.mark.parametrize(
    ("answer", "shown", "error"),
    [
        ("", "no result", "empty"),
        (" \n", "no result", "empty"),
        (failing("no such page"), "no such page", "error"),
        (failing(""), "error", "error"),
        (failing("what?", "malformed"), "malformed: what?", "malformed"),
        (failing("too slow", "timeout"), "timeout: too slow", "timeout"),
        (ValueError("bad </result>"), "ValueError: bad < /result>", "error"),
        (None, "TypeError: a tool must answer with text, got NoneType", "error"),
        ("a <answer>7</answer>", "a < answer>7< /answer>", None),
        ("\ud800", "?", None),
    ],
)
def test_whatever_a_tool_does_is_a_readable_result_with_its_kind(answer, shown, error):
    trajectory = roll_one(ONE_CALL, FixedTool(answer))
    (call,) = trajectory.tool_calls
    assert (call.result, call.error, call.succeeded) == (shown, error, error is None)
    assert f"<result>{shown}</result><answer>" in trajectory.response_text
    assert trajectory.stop_reason == "eos"


def test_a_malformed_call_is_explained():
    trajectory = roll_one(after({"?": "a</search>", "": f"ok{EOS}"}), EchoTool())
    (call,) = trajectory.tool_calls
    assert summary(call) == ("search", "", "malformed call: < /search> without < search>", "malformed")


# --- limits ----------------------------------------------------------------------------------------------------------


def test_one_call_too_many_is_answered_with_a_note_and_the_next_ends_the_rollout():
    tool = EchoTool()
    trajectory = roll_one(after({"": "<search>a</search>"}), tool, max_tool_calls=2)
    note = "no tool calls left (limit 2); answer now"
    assert [(call.result, call.error) for call in trajectory.tool_calls] == [
        ("[a]", None),
        ("[a]", None),
        (note, "limit"),
    ]
    assert trajectory.stop_reason == "call_limit"
    assert trajectory.response_text.endswith(f"<result>{note}</result><search>a</search>")
    assert tool.calls == ["a", "a"]


def test_after_the_note_the_policy_may_still_answer():
    trajectory = roll_one(after({"?": "<search>a</search>", "": f"ok{EOS}"}), EchoTool(), max_tool_calls=0)
    assert trajectory.tool_calls[0].error == "limit"
    assert trajectory.response_text.endswith("</result>ok")
    assert trajectory.stop_reason == "eos"


def test_malformed_calls_count_so_that_they_end_too():
    trajectory = roll_one(after({"": "</search>"}), EchoTool(), max_tool_calls=2)
    assert [call.error for call in trajectory.tool_calls] == ["malformed", "malformed", "limit"]
    assert trajectory.stop_reason == "call_limit"


def test_the_response_budget_holds_tokens_and_results_together():
    sampler = ScriptedSampler(after({"?": "<search>a</search>", "": "x" * 500}))
    trajectory = roll(sampler, [EchoTool()], max_response_tokens=40)[0]
    assert len(trajectory.response_ids) == len(trajectory.sampled) == len(trajectory.behaviour_logprobs) == 40
    assert trajectory.stop_reason == "length"
    assert [request.max_tokens for request in sampler.requests] == [40, 40 - trajectory.tool_calls[0].output_stop]


def test_a_result_that_does_not_fit_is_cut_inside_its_tags():
    call_ids, tags = len(ids_of("<search>a</search>")), len(ids_of("<result>")) + len(ids_of("</result>"))
    trajectory = roll_one(ONE_CALL_SHORT, FixedTool("0123456789"), max_response_tokens=call_ids + tags + 4)
    (call,) = trajectory.tool_calls
    assert trajectory.response_text == "<search>a</search><result>0123</result>"
    assert call.result == "0123"
    assert call.output_stop == len(trajectory.response_ids) == call_ids + tags + 4
    assert trajectory.stop_reason == "length"


ONE_CALL_SHORT = after({"?": "<search>a</search>", "": f"ok{EOS}"})


def test_without_room_for_the_tags_the_budget_still_holds():
    budget = len(ids_of("<search>a</search>")) + 3
    trajectory = roll_one(ONE_CALL_SHORT, FixedTool("0123456789"), max_response_tokens=budget)
    assert len(trajectory.response_ids) == budget
    assert trajectory.tool_calls[0].result == ""
    assert trajectory.tool_calls[0].output_stop == budget


def test_a_call_that_leaves_no_room_for_a_result_is_not_made():
    tool = EchoTool()
    budget = len(ids_of("<search>a</search>"))
    trajectory = roll_one(ONE_CALL_SHORT, tool, max_response_tokens=budget)
    assert (trajectory.stop_reason, trajectory.tool_calls, tool.calls) == ("length", [], [])


def test_results_are_cut_to_their_limit():
    trajectory = roll_one(ONE_CALL, FixedTool("0123456789"), max_result_tokens=3)
    assert trajectory.tool_calls[0].result == "012"
    assert "<result>012</result>" in trajectory.response_text


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_response_tokens": 0}, "rollout.max_response_tokens must be at least 1, got 0"),
        ({"max_tool_calls": -1}, "rollout.max_tool_calls must be at least 0, got -1"),
        ({"temperature": -0.5}, r"rollout.temperature must be 0 \(greedy\) or a number from 0.01 on, got -0.5"),
        ({"top_p": 0.0}, r"rollout.top_p must be in \(0, 1\], got 0.0"),
        ({"min_p": 1.5}, r"rollout.min_p must be in \[0, 1\], got 1.5"),
        ({"top_k": -1}, "rollout.top_k must be at least 0, got -1"),
    ],
)
def test_limits_out_of_range_are_refused(limits, message):
    with pytest.raises(ConfigurationError, match=message):
        RolloutLimits(**limits)


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(ConfigurationError, match="tool names must differ, got \\['search', 'search'\\]"):
        RolloutLoop(ScriptedSampler(ONE_CALL), [EchoTool(), EchoTool()], scripted_tokenizer(), RolloutLimits())


# --- many trajectories -----------------------------------------------------------------------------------------------


def tasks(n: int) -> list[Prefix]:
    return [Prefix(make_task(f"t{i}"), seed=100 + i) for i in range(n)]


def seeded_script(text: str, seed: int) -> str:
    """A policy whose every choice depends on the seed of the request and on what it has read."""
    choice = random.Random(f"{seed} {text}")
    if choice.random() < 0.6:
        return f"<search>{choice.randrange(1000)}</search>"
    return f"<answer>{choice.randrange(1000)}</answer>{EOS}"


def without_seconds(trajectories: list[Trajectory]) -> list[Trajectory]:
    for trajectory in trajectories:
        for call in trajectory.tool_calls:
            call.seconds = 0.0
    return trajectories


def test_rollouts_are_a_function_of_their_seeds_whatever_the_timing():
    outcomes = []
    for trial in range(4):
        timing = random.Random(trial)
        tool = EchoTool(seconds=lambda argument, timing=timing: timing.uniform(0, 0.01))
        sampler = ScriptedSampler(seeded_script, steps=lambda request, timing=timing: timing.randrange(1, 5))
        prefixes = tasks(16)
        order = list(range(16))
        timing.shuffle(order)
        mixed = without_seconds(
            roll(sampler, [tool], prefixes=[prefixes[i] for i in order], tool_workers=1 + trial, max_tool_calls=9)
        )
        outcomes.append([mixed[order.index(i)] for i in range(16)])
    assert outcomes[0] == outcomes[1] == outcomes[2] == outcomes[3]
    assert {len(trajectory.tool_calls) for trajectory in outcomes[0]} >= {0, 1, 2}


def test_no_two_requests_share_a_seed():
    sampler = ScriptedSampler(seeded_script)
    roll(sampler, [EchoTool()], prefixes=tasks(20), max_tool_calls=9)
    seeds = [request.seed for request in sampler.requests]
    assert len(set(seeds)) == len(seeds) > 20


def test_a_slow_tool_does_not_hold_up_the_others():
    # Seven trajectories make three quick calls each while the eighth waits for one slow call.
    finished_at: dict[int, float] = {}  # by how many have
    tool = EchoTool(seconds=lambda argument: 1.5 if argument == "slow" else 0.0)

    def script(text: str, seed: int) -> str:
        calls = text.count("<search>")
        if text.startswith("t0"):
            return "<search>slow</search>" if calls == 0 else f"ok{EOS}"
        return f"<search>{calls}</search>" if calls < 3 else f"ok{EOS}"

    loop = RolloutLoop(ScriptedSampler(script), [tool], scripted_tokenizer(), RolloutLimits(tool_workers=2))
    started = time.monotonic()

    def note(done: int, total: int) -> None:
        finished_at[done] = time.monotonic() - started

    loop.run(tasks(8), policy_version=0, progress=note)
    assert finished_at[7] < 1.0
    assert finished_at[8] >= 1.5
    assert loop.statistics.waiting_seconds > 0.4


def test_answers_are_encoded_where_they_were_given_not_where_tokens_are_generated(monkeypatch):
    threads: list[tuple[str, str]] = []

    def encode(tokenizer: Any, text: str) -> list[int]:
        threads.append((text, threading.current_thread().name))
        return encode_text(tokenizer, text)

    monkeypatch.setattr(plain_text, "encode_text", encode)
    trajectory = roll_one(ONE_CALL, FixedTool("\n so it is "))
    assert trajectory.tool_calls[0].result == "so it is"
    assert threads == [("so it is", "appo-tool")]


def test_slow_calls_overlap():
    tool = EchoTool(seconds=lambda argument: 0.3)
    started = time.monotonic()
    roll(ScriptedSampler(ONE_CALL), [tool], prefixes=tasks(12), tool_workers=12)
    assert time.monotonic() - started < 12 * 0.3 / 2


def test_progress_counts_every_trajectory_and_tells_once_per_step(monkeypatch):
    monkeypatch.setattr(rollout_loop, "_SETTLE_S", 0.0)
    seen: list[tuple[int, int]] = []
    sampler = ScriptedSampler(after({"": f"ok{EOS}"}), steps=lambda request: 1 + request.id // 2)
    loop = RolloutLoop(sampler, [EchoTool()], scripted_tokenizer(), RolloutLimits())
    loop.run(tasks(5), policy_version=0, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert loop.run([], policy_version=0) == []


def test_progress_is_told_rarely_but_before_a_wait_for_tools_and_at_the_end(monkeypatch):
    monkeypatch.setattr(rollout_loop, "_SETTLE_S", 60.0)
    seen: list[tuple[int, int]] = []
    tool = EchoTool(seconds=lambda argument: 0.2)
    script = after({"t3?": "<search>slow</search>", "": f"ok{EOS}"})
    loop = RolloutLoop(ScriptedSampler(script), [tool], scripted_tokenizer(), RolloutLimits())
    loop.run(tasks(4), policy_version=0, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 4), (4, 4)]


def test_statistics_count_tokens_and_calls_once():
    loop = RolloutLoop(ScriptedSampler(ONE_CALL), [EchoTool()], scripted_tokenizer(), RolloutLimits())
    trajectories = loop.run(tasks(3), policy_version=0)
    taken = loop.take_statistics()
    assert taken.sampled_tokens == sum(trajectory.num_sampled for trajectory in trajectories)
    # Each trajectory asks twice: with its prompt, and with everything up to the end of the result.
    assert taken.prompt_tokens == sum(2 * len(t.prompt_ids) + t.tool_calls[0].output_stop for t in trajectories)
    assert taken.tool_calls == 3
    assert taken.seconds > 0
    assert loop.take_statistics().tool_calls == 0


# --- time limits and failures ----------------------------------------------------------------------------------------


def test_a_hung_call_is_a_readable_timeout_and_its_session_is_never_used_again():
    tool = HangingTool(timeout_s=0.1, interrupts=False)
    script = after({"?": "<search>hang</search>", "seconds</result>": "<search>b</search>", "": f"ok{EOS}"})
    started = time.monotonic()
    trajectory = roll_one(script, tool)
    assert time.monotonic() - started < 5
    first, second = trajectory.tool_calls
    assert first.error == "timeout"
    assert first.result == "timeout: no answer within 0.11 seconds"
    assert (second.result, second.error) == ("[b]", None)
    warm_up, hung, fresh = tool.sessions
    assert (warm_up.calls, hung.calls, fresh.calls) == ([], ["hang"], ["b"])
    assert fresh.closed
    assert not hung.closed  # it still works
    tool.release.set()
    wait_for(lambda: hung.closed)
    assert not hung.closed_while_busy


def test_an_interrupted_session_is_closed_by_the_thread_that_used_it():
    tool = HangingTool(timeout_s=0.1)
    roll_one(after({"?": "<search>hang</search>", "": f"ok{EOS}"}), tool)
    wait_for(lambda: all(session.closed for session in tool.sessions))
    assert not any(session.closed_while_busy for session in tool.sessions)


def test_a_session_that_opens_too_late_never_gets_the_call():
    release = threading.Event()

    class SlowToOpen(HangingTool):
        def open(self, task):
            session = super().open(task)
            if len(self.sessions) == 2:  # the first one warms the tool up
                release.wait(10)
            return session

    tool = SlowToOpen(timeout_s=0.1)
    script = after({"?": "<search>a</search>", "seconds</result>": "<search>b</search>", "": f"ok{EOS}"})
    trajectory = roll_one(script, tool)
    release.set()
    wait_for(lambda: all(session.closed for session in tool.sessions))
    called = [session.calls for session in tool.sessions]
    assert [call.error for call in trajectory.tool_calls] == ["timeout", None]
    assert called == [[], [], ["b"]]


def test_sessions_are_closed_when_their_trajectory_ends_not_when_all_have(monkeypatch):
    monkeypatch.setattr(rollout_loop, "_SETTLE_S", 0.0)
    open_sessions: list[int] = []

    class Counting(HangingTool):
        def open(self, task):
            open_sessions.append(sum(not session.closed for session in self.sessions))
            return super().open(task)

    tool = Counting()
    # One trajectory after the other, with time for the thread that closes.
    sampler = ScriptedSampler(ONE_CALL, steps=lambda request: 1 + 4 * request.id, step_s=0.01)
    roll(sampler, [tool], prefixes=tasks(6))
    assert all(session.closed for session in tool.sessions)
    assert max(open_sessions) <= 2


def test_a_session_that_closes_slowly_holds_no_other_trajectory_up():
    called = threading.Event()
    waited = []

    class SlowToClose(HangingTool):
        def open(self, task):
            session = super().open(task)
            if len(self.sessions) == 2:  # of the first trajectory; the one before warms the tool up
                session.close = lambda: waited.append(called.wait(10))
            if len(self.sessions) == 3:  # of the second, which calls when the first has ended
                called.set()
            return session

    roll(ScriptedSampler(ONE_CALL, steps=lambda request: 1 + 4 * request.id), [SlowToClose()], prefixes=tasks(2))
    assert waited == [True]


def test_an_engine_error_closes_everything_and_is_the_error_told():
    tool = HangingTool(timeout_s=30)
    script = after({"t0?": "<search>hang</search>", "?": "<search>a</search>", "": f"ok{EOS}"})

    class DyingSampler(ScriptedSampler):
        def abort(self, ids):
            super().abort(ids)
            raise RuntimeError("cannot abort either")

    sampler = DyingSampler(script, steps=lambda request: 1 + 3 * (request.id == 2), fail_at_step=3, step_s=0.05)
    started = time.monotonic()
    with pytest.raises(SamplerError, match="the engine died"):
        roll(sampler, [tool], prefixes=tasks(3))
    assert time.monotonic() - started < 10
    assert 2 in sampler.aborted
    assert sampler.num_unfinished == 0
    wait_for(lambda: all(session.closed for session in tool.sessions))
    assert not any(session.closed_while_busy for session in tool.sessions)


def test_a_tool_that_cannot_start_stops_the_run():
    class Broken(EchoTool):
        def open(self, task):
            raise DataError("search: no corpus")

    sampler = ScriptedSampler(ONE_CALL)
    with pytest.raises(DataError, match="search: no corpus"):
        roll(sampler, [Broken()], prefixes=tasks(3))
    assert sampler.num_unfinished == 0


def test_a_tool_that_fails_to_open_once_is_a_failed_call():
    class Flaky(EchoTool):
        opened = 0

        def open(self, task):
            self.opened += 1
            if self.opened < 3:
                raise OSError("connection refused")
            return super().open(task)

    trajectory = roll_one(
        after({"?": "<search>a</search>", "refused</result>": "<search>b</search>", "": f"ok{EOS}"}), Flaky()
    )
    assert [(call.result, call.error) for call in trajectory.tool_calls] == [
        ("OSError: connection refused", "error"),
        ("[b]", None),
    ]


def test_a_session_that_fails_to_close_is_a_warning():
    class BadClose(HangingTool):
        def open(self, task):
            session = super().open(task)
            if len(self.sessions) > 1:
                session.close = lambda: 1 / 0
            return session

    with pytest.warns(UserWarning, match="closing a session of tool 'search' failed: ZeroDivisionError"):
        trajectory = roll_one(ONE_CALL, BadClose())
    assert trajectory.tool_calls[0].succeeded


def wait_for(condition: Any, *, seconds: float = 5.0) -> None:
    for _ in itertools.takewhile(lambda _: not condition(), range(int(seconds * 100))):
        time.sleep(0.01)
    assert condition()
