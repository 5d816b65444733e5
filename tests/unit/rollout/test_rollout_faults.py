"""Claims about engines that break or hang: what was sampled is kept, the rest is asked again, nothing hangs."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from appo_lightning.errors import ConfigurationError, EngineFailure, SamplerError
from appo_lightning.rollout.episode import Prefix
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.loop import RolloutLoop
from appo_lightning.rollout.seeds import derive_seed
from appo_lightning.rollout.tree import score_rewards
from appo_lightning.rollout.watchdog import Watchdog
from appo_lightning.samplers.base import Completion, SampleRequest
from helpers.scripted import EchoTool, LengthReward, ScriptedSampler, make_task, scripted_tokenizer
from helpers.tiny import EOS


def script(text: str, seed: int) -> str:
    return f"<search>{seed % 97}</search>" if text.count("<search>") < 2 else f"<answer>{seed % 89}</answer>{EOS}"


class FaultySampler(ScriptedSampler):
    """Breaks at some calls of step or submit, counted over all engines; broken until ``restart``."""

    def __init__(self, *, steps: tuple[int, ...] = (), submits: tuple[int, ...] = (), error: Any = None) -> None:
        super().__init__(script, steps=lambda request: 1 + request.id % 3)
        self.bad_steps, self.bad_submits = steps, submits
        self.error = error or EngineFailure("the engine died")
        self.calls = self.asked = self.restarts = 0
        self.broken = False

    def submit(self, request: SampleRequest) -> None:
        self.asked += 1
        self.broken = self.broken or self.asked in self.bad_submits
        if self.broken:
            raise self.error
        super().submit(request)

    def step(self) -> list[Completion]:
        self.calls += 1
        self.broken = self.broken or self.calls in self.bad_steps
        if self.broken:
            raise self.error
        return super().step()

    def restart(self) -> None:
        self.restarts += 1
        self.broken = False
        self._due.clear()


def roll(sampler: ScriptedSampler, restart: Any = None, **limits: Any) -> list[Any]:
    tool = EchoTool(seconds=lambda argument: int(argument) % 3 / 100)
    loop = RolloutLoop(sampler, [tool], scripted_tokenizer(), RolloutLimits(**limits), restart)
    trajectories = loop.run([Prefix(make_task(f"t{i}"), seed=i) for i in range(6)], policy_version=0)
    for call in [call for trajectory in trajectories for call in trajectory.tool_calls]:
        call.seconds = 0.0
    return trajectories


@pytest.mark.parametrize(
    "faults",
    [
        {"steps": (1,)},
        {"steps": (3, 4)},
        {"submits": (1,)},
        {"submits": (8,)},
        {"steps": (4,), "submits": (9,)},
        {"steps": (2,), "error": RuntimeError("out of memory")},
    ],
    ids=str,
)
def test_a_fresh_engine_goes_on_where_the_broken_one_stopped(faults):
    whole = roll(ScriptedSampler(script))
    sampler = FaultySampler(**faults)
    with pytest.warns(UserWarning, match="a fresh engine \\(1 of at most 2\\) takes over"):
        assert roll(sampler, sampler.restart) == whole
    assert 1 <= sampler.restarts <= 2


def test_finished_turns_are_not_asked_again():
    plain, faulty = ScriptedSampler(script, steps=lambda request: 1 + request.id % 3), FaultySampler(steps=(5,))
    roll(plain)
    with pytest.warns(UserWarning, match="takes over"):
        roll(faulty, faulty.restart)
    assert 0 < len(faulty.requests) - len(plain.requests) <= 6


def test_after_so_many_fresh_engines_the_run_stops_with_the_reason():
    sampler = FaultySampler(steps=tuple(range(2, 99)))
    with pytest.warns(UserWarning, match="takes over"), pytest.raises(EngineFailure, match=r"^the engine died$"):
        roll(sampler, sampler.restart, max_restarts=1)
    assert sampler.restarts == 1


def test_without_a_way_to_start_afresh_a_broken_engine_stops_the_run():
    with pytest.raises(EngineFailure, match="the engine died"):
        roll(FaultySampler(steps=(2,)))


def test_a_request_that_no_engine_can_answer_is_not_tried_again():
    sampler = FaultySampler(submits=(1,), error=SamplerError("request 0 needs 70 tokens, max_length is 64"))
    with pytest.raises(SamplerError, match="max_length is 64"):
        roll(sampler, sampler.restart)
    assert sampler.restarts == 0


class Stalling(ScriptedSampler):
    """From the third step on, samples nothing: at once, or within a step that never ends."""

    def __init__(self, *, sleeps: bool) -> None:
        super().__init__(script)
        self.calls, self.sleeps, self.well = 0, sleeps, False

    def step(self) -> list[Completion]:
        self.calls += 1
        if self.calls < 3 or self.well:
            return super().step()
        time.sleep(60 if self.sleeps else 0.01)
        return []

    def restart(self) -> None:
        self.well = True
        self._due.clear()


@pytest.mark.parametrize("sleeps", [False, True])
def test_an_engine_that_stalls_is_given_up_after_the_limit(sleeps):
    started = time.monotonic()
    with pytest.raises(EngineFailure, match=r"sampled no token for 0.3 seconds \(data.rollout.stall_timeout_s\)"):
        roll(Stalling(sleeps=sleeps), stall_timeout_s=0.3)
    assert 0.3 <= time.monotonic() - started < 20


@pytest.mark.parametrize("sleeps", [False, True])
def test_a_stalled_engine_is_replaced(sleeps):
    sampler = Stalling(sleeps=sleeps)
    with pytest.warns(UserWarning, match="sampled no token.*takes over"):
        assert roll(sampler, sampler.restart, stall_timeout_s=0.3) == roll(ScriptedSampler(script))


def test_a_stalled_engine_is_replaced_where_ctrl_c_is_ignored():
    """As in a process that a script started in the background."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        test_a_stalled_engine_is_replaced(sleeps=True)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_a_step_that_nothing_can_interrupt_ends_the_process_with_one_line():
    """A lock that is never freed is waited for again after every signal, as a hung kernel would be."""
    program = """
import ctypes
from appo_lightning.rollout.watchdog import Watchdog

watchdog = Watchdog(0.2, grace_s=0.4)
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
with watchdog.watching():
    watchdog.guard(lambda: libc.pthread_mutex_lock(mutex))
print("went on")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "error: the engine sampled no token for 0.2 seconds (data.rollout.stall_timeout_s) and cannot be interrupted\n"
    )


def test_one_thread_watches_run_after_run_and_ends_with_the_watchdog():
    def watching() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "appo-watchdog"} - before

    before = {thread for thread in threading.enumerate() if thread.name == "appo-watchdog"}
    watchdog = Watchdog(0.2)
    for _ in range(3):
        with watchdog.watching():
            assert watchdog.guard(lambda: "well") == "well"
    (thread,) = watching()
    with watchdog.watching(), pytest.raises(EngineFailure, match=r"sampled no token for 0.2 seconds"):
        watchdog.guard(lambda: time.sleep(20))
    assert watching() == {thread}
    del watchdog
    thread.join(10)
    assert not thread.is_alive()


def test_a_slow_engine_that_samples_is_no_stall():
    class Slow(ScriptedSampler):
        count = 0

        def step(self) -> list[Completion]:
            self.count += 1
            time.sleep(0.05)
            return super().step()

        @property
        def progress(self) -> int:
            return self.count

    assert roll(Slow(script, steps=lambda request: 12), stall_timeout_s=0.3) == roll(ScriptedSampler(script))


def test_an_interrupt_from_the_keyboard_stays_one():
    class Interrupted(ScriptedSampler):
        def step(self) -> list[Completion]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        roll(Interrupted(script))


def slow_city(text: str, seed: int) -> str:
    """Every third rollout asks a tool that takes its time, in its second turn."""
    calls = text.count("<search>")
    slow = seed % 3 == 0 and calls == 1
    return f"<search>{9 if slow else 0}</search>" if calls < 2 else f"<answer>{seed}</answer>{EOS}"


@pytest.mark.parametrize("patience_s", [None, 0.2])
def test_patience_ends_the_rollouts_that_only_wait_for_tools_and_keeps_the_others(patience_s):
    tool = EchoTool(seconds=lambda argument: int(argument) / 10 * (5 if patience_s else 1))
    limits = RolloutLimits(patience_s=patience_s, max_response_tokens=200)
    sampler = ScriptedSampler(slow_city)
    loop = RolloutLoop(sampler, [tool], scripted_tokenizer(), limits)
    prefixes = [Prefix(make_task(f"t{i}"), seed=i) for i in range(9)]
    started = time.monotonic()
    trajectories = loop.run(prefixes, policy_version=0)
    late = [i for i, trajectory in enumerate(trajectories) if trajectory.stop_reason == "late"]
    # The seed of a turn is derived: which rollouts are slow is read off what they asked.
    slow = sorted({r.id for r in sampler.requests if derive_seed(r.id, 2) % 3 == 0})
    assert 0 < len(slow) < 9
    assert late == (slow if patience_s else [])
    assert loop.take_statistics().late == len(late)
    if patience_s:
        assert time.monotonic() - started < 3  # the slow calls take 4.5 s
        assert all(len(trajectories[i].tool_calls) == 1 for i in late)  # what was answered is there
        assert sampler.num_unfinished == 0
    score_rewards(LengthReward(), make_task(), trajectories)
    assert [i for i, trajectory in enumerate(trajectories) if trajectory.reward is None] == late


def test_limits_without_an_end_are_refused():
    for limits in ({"patience_s": 0.0}, {"patience_s": float("inf")}):
        with pytest.raises(ConfigurationError, match=r"rollout\.patience_s must be positive and finite, or null"):
            RolloutLimits(**limits)
    for limits in ({"stall_timeout_s": 0.0}, {"stall_timeout_s": float("inf")}, {"max_restarts": -1}):
        with pytest.raises(ConfigurationError, match=r"rollout\.(stall_timeout_s|max_restarts) must be"):
            RolloutLimits(**limits)
    tool = EchoTool()
    tool.timeout_s = float("inf")
    with pytest.raises(ConfigurationError, match="tool 'search' must have a time limit"):
        RolloutLoop(ScriptedSampler(script), [tool], scripted_tokenizer(), RolloutLimits())
