"""Claims about tool calls beside generation: bounded in number and time, and never lost."""

from __future__ import annotations

import gc
import math
import sys
import threading
import time
from collections.abc import Callable

import pytest

from appo_lightning.errors import DataError, ToolFailure
from appo_lightning.rollout.toolpool import ToolOutcome, ToolPool


def submit(
    pool: ToolPool[str],
    key: str,
    run: Callable[[], str],
    *,
    timeout_s: float = 20.0,
    interrupt: Callable[[], None] = lambda: None,
) -> None:
    pool.submit(key, run, interrupt=interrupt, timeout_s=timeout_s)


def drain(pool: ToolPool[str]) -> dict[str, ToolOutcome[str]]:
    outcomes: dict[str, ToolOutcome[str]] = {}
    while len(pool):
        for outcome in pool.poll(wait_s=math.inf):
            assert outcome.key not in outcomes
            outcomes[outcome.key] = outcome
    return outcomes


def raising(error: BaseException) -> Callable[[], str]:
    def run() -> str:
        raise error

    return run


def test_every_call_comes_back_once_with_its_answer():
    pool: ToolPool[str] = ToolPool(4)
    for i in range(50):
        submit(pool, f"k{i}", lambda i=i: f"answer {i}")
    outcomes = drain(pool)
    assert {key: outcome.text for key, outcome in outcomes.items()} == {f"k{i}": f"answer {i}" for i in range(50)}
    assert all(outcome.failure is None for outcome in outcomes.values())


def test_at_most_so_many_calls_run_at_once():
    pool: ToolPool[str] = ToolPool(3)
    running, most, lock = 0, 0, threading.Lock()

    def run() -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        return ""

    for i in range(20):
        submit(pool, str(i), run)
    drain(pool)
    assert most == 3


@pytest.mark.parametrize(
    ("error", "text", "kind"),
    [
        (ToolFailure("no such page"), "no such page", "error"),
        (ToolFailure("what?", "malformed"), "what?", "malformed"),
        (ValueError("bad"), "ValueError: bad", "error"),
        (SystemExit(3), "SystemExit: 3", "error"),
        (KeyboardInterrupt(), "KeyboardInterrupt: ", "error"),
    ],
)
def test_whatever_a_call_raises_becomes_its_outcome(error, text, kind):
    pool: ToolPool[str] = ToolPool(1)
    submit(pool, "k", raising(error))
    outcome = drain(pool)["k"]
    assert outcome.failure is not None
    assert (outcome.text, outcome.failure.kind) == (text, kind)


def test_an_answer_that_is_no_text_is_a_failure():
    pool: ToolPool[str] = ToolPool(1)
    submit(pool, "k", lambda: None)  # type: ignore[arg-type, return-value]
    assert drain(pool)["k"].text == "TypeError: a tool must answer with text, got NoneType"


def test_a_tool_that_cannot_work_at_all_stops_the_run():
    pool: ToolPool[str] = ToolPool(1)
    submit(pool, "k", raising(DataError("no corpus")))
    with pytest.raises(DataError, match="no corpus"):
        drain(pool)


def test_a_hung_call_costs_its_limit_and_frees_its_slot():
    pool: ToolPool[str] = ToolPool(1)
    release, interrupted = threading.Event(), threading.Event()

    def hang() -> str:
        release.wait(30)
        return "late"

    started = time.monotonic()
    submit(pool, "hung", hang, timeout_s=0.2, interrupt=interrupted.set)
    submit(pool, "next", lambda: "fine")
    outcomes = drain(pool)
    assert 0.2 <= time.monotonic() - started < 5
    assert outcomes["next"].text == "fine"
    failure = outcomes["hung"].failure
    assert failure is not None
    assert (str(failure), failure.kind) == ("no answer within 0.2 seconds", "timeout")
    assert interrupted.wait(5)
    # Its late answer is dropped, whatever is asked meanwhile.
    submit(pool, "slow", lambda: time.sleep(0.2) or "slow")  # type: ignore[func-returns-value]
    release.set()
    assert {key: outcome.text for key, outcome in drain(pool).items()} == {"slow": "slow"}
    assert pool.poll(wait_s=math.inf) == []


def test_an_interrupt_that_hangs_or_raises_hurts_nobody():
    pool: ToolPool[str] = ToolPool(2)
    for key, interrupt in (("a", lambda: time.sleep(30)), ("b", lambda: 1 / 0)):
        submit(pool, key, lambda: time.sleep(1) or "", timeout_s=0.05, interrupt=interrupt)  # type: ignore
    started = time.monotonic()
    assert set(drain(pool)) == {"a", "b"}
    assert time.monotonic() - started < 1


def test_a_call_waiting_for_its_turn_loses_no_time():
    pool: ToolPool[str] = ToolPool(1)
    for i in range(4):
        submit(pool, str(i), lambda: time.sleep(0.1) or "ok", timeout_s=0.35)  # type: ignore[func-returns-value]
    assert [outcome.text for outcome in drain(pool).values()] == ["ok"] * 4


def test_a_blocking_poll_wakes_as_soon_as_a_call_ends():
    pool: ToolPool[str] = ToolPool(2)
    submit(pool, "slow", lambda: time.sleep(3) or "", timeout_s=60)  # type: ignore[func-returns-value]
    submit(pool, "fast", lambda: time.sleep(0.1) or "", timeout_s=60)  # type: ignore[func-returns-value]
    started = time.monotonic()
    assert [outcome.key for outcome in pool.poll(wait_s=math.inf)] == ["fast"]
    assert time.monotonic() - started < 1.5
    assert pool.poll() == []
    assert time.monotonic() - started < 1.5
    pool.abandon()


def test_an_endless_time_limit_is_possible():
    pool: ToolPool[str] = ToolPool(1)
    submit(pool, "k", lambda: time.sleep(0.05) or "ok", timeout_s=float("inf"))  # type: ignore[func-returns-value]
    assert drain(pool)["k"].text == "ok"


def test_a_poll_with_nothing_to_wait_for_returns():
    assert ToolPool(1).poll(wait_s=math.inf) == []


def test_answers_that_race_with_their_deadline_are_never_lost():
    # Calls end at their limit to the microsecond, and the clock takes turns often: a pool that forgets an answer
    # handed in between two looks loses some in a hundred of these runs.
    def work() -> str:
        end = time.monotonic() + 0.0005
        while time.monotonic() < end:
            pass
        return "ok"

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for trial in range(400):
            pool: ToolPool[str] = ToolPool(4)
            for key in "ab":
                submit(pool, key, work, timeout_s=0.00052)
            seen: list[str] = []
            while len(pool):
                seen += [outcome.key for outcome in pool.poll(wait_s=math.inf if trial % 2 == 0 else 0.0)]
            assert sorted(seen) == ["a", "b"]
    finally:
        sys.setswitchinterval(interval)


def test_abandoned_calls_are_interrupted_and_never_come_back():
    pool: ToolPool[str] = ToolPool(1)
    interrupted = threading.Event()
    submit(pool, "running", lambda: str(interrupted.wait(10)), interrupt=interrupted.set)
    submit(pool, "waiting", lambda: "never")
    pool.abandon()
    assert interrupted.wait(5)
    assert len(pool) == 0
    time.sleep(0.05)
    assert pool.poll(wait_s=math.inf) == []


def tool_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "appo-tool"}


def ended(threads: set[threading.Thread]) -> bool:
    for thread in threads:
        thread.join(5)
    return not any(thread.is_alive() for thread in threads)


def test_threads_are_kept_for_further_calls_and_runs_and_end_with_the_pool():
    before = tool_threads()
    pool: ToolPool[str] = ToolPool(3)
    used: set[threading.Thread] = set()
    for i in range(30):
        submit(pool, str(i), lambda: used.add(threading.current_thread()) or "ok")  # type: ignore[func-returns-value]
    drain(pool)
    assert 1 <= len(used) <= 3
    pool.abandon()
    first = set(used)
    for i in range(30):
        submit(pool, str(i), lambda: used.add(threading.current_thread()) or "ok")  # type: ignore[func-returns-value]
    drain(pool)
    assert first <= used
    started = tool_threads() - before
    assert used <= started  # one may have found every call taken
    assert len(started) <= 3
    del pool
    gc.collect()
    assert ended(started)


def test_a_thread_that_hangs_is_replaced_and_takes_no_further_call():
    before = tool_threads()
    pool: ToolPool[str] = ToolPool(2)
    release = threading.Event()
    hung: list[threading.Thread] = []

    def hang() -> str:
        hung.append(threading.current_thread())
        release.wait(30)
        return "late"

    for i in range(2):
        submit(pool, f"hung {i}", hang, timeout_s=0.05)
    drain(pool)
    used: list[threading.Thread] = []
    for i in range(20):
        submit(pool, str(i), lambda: used.append(threading.current_thread()) or "ok")  # type: ignore[func-returns-value]
    assert len(drain(pool)) == 20
    release.set()
    assert ended(set(hung))
    for i in range(20):
        submit(pool, str(i), lambda: used.append(threading.current_thread()) or "ok")  # type: ignore[func-returns-value]
    assert len(drain(pool)) == 20
    assert not set(used) & set(hung)
    assert len(set(used)) <= 2
    del pool
    gc.collect()
    assert ended(tool_threads() - before)


def test_waiting_ends_with_the_time_given():
    pool: ToolPool[str] = ToolPool(2)
    release = threading.Event()
    pool.submit("slow", lambda: str(release.wait(20)), interrupt=release.set, timeout_s=30)
    started = time.monotonic()
    assert pool.poll(wait_s=0.1) == []
    assert 0.1 <= time.monotonic() - started < 10
    release.set()
    assert [outcome.key for outcome in pool.poll(wait_s=20)] == ["slow"]
