"""Tool calls beside generation: bounded in number and in time, whatever a tool does."""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from appo_lightning.errors import AppoError, ToolFailure

K = TypeVar("K")
_LONGEST_WAIT_S = 60.0  # a queue cannot wait for ever with a time limit of infinity


@dataclass(slots=True)
class ToolOutcome(Generic[K]):
    """How a call ended."""

    key: K
    text: str
    failure: ToolFailure | None
    seconds: float


@dataclass(slots=True)
class _Call(Generic[K]):
    key: K
    run: Callable[[], str]
    interrupt: Callable[[], None]
    timeout_s: float
    started: float = 0.0
    given_up: bool = False


class ToolPool(Generic[K]):
    """Runs calls in daemon threads, at most ``workers`` at a time.

    A call that outlives its limit is interrupted and given up: its trajectory goes on with a time-out result, its slot
    is freed, and whatever it returns later is dropped. So a hung tool costs its own trajectory its own limit, no more.
    The thread that polls decides alone how a call ended: workers only hand in answers.

    Threads are kept for further calls, as long as the pool lives: the thread that generates has to wait for one that
    starts, and on a busy machine each such wait costs milliseconds.

    Args:
        workers: calls that run at the same time.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._numbers = itertools.count()
        self._waiting: deque[_Call[K]] = deque()
        self._running: dict[int, _Call[K]] = {}
        self._next_deadline = math.inf  # no call that runs has an earlier one
        self._answers: queue.SimpleQueue[tuple[int, ToolOutcome[K] | AppoError]] = queue.SimpleQueue()
        self._started: queue.SimpleQueue[tuple[int, _Call[K]] | None] = queue.SimpleQueue()  # None ends the threads
        self._threads = 0  # that take calls; a thread of a call given up takes none again
        weakref.finalize(self, self._started.put, None)

    def __len__(self) -> int:
        """Calls submitted and not yet returned by ``poll``."""
        return len(self._waiting) + len(self._running)

    def submit(self, key: K, run: Callable[[], str], *, interrupt: Callable[[], None], timeout_s: float) -> None:
        """Queue a call; its time runs from the moment it starts."""
        self._waiting.append(_Call(key, run, interrupt, timeout_s))
        self._start_waiting()

    def poll(self, *, wait_s: float = 0.0) -> list[ToolOutcome[K]]:
        """Calls that ended since the last poll.

        Args:
            wait_s: wait so long until at least one ends (or none is left).

        Raises:
            AppoError: a call raised it: the tool cannot work at all.
        """
        until = time.monotonic() + wait_s
        wait_s = 0.0
        while self._running:
            outcomes = self._answered(wait_s)
            now = time.monotonic()
            if now >= self._next_deadline:
                outcomes += self._expired(now)
            if outcomes:
                self._start_waiting()
            if outcomes or now >= until:
                return outcomes
            wait_s = min(until - now, max(self._next_deadline - now, 0.0005), _LONGEST_WAIT_S)
        return []

    def abandon(self) -> None:
        """Give up everything that has not ended: for the end of a run."""
        self._waiting.clear()
        for number in list(self._running):
            self._give_up(number)

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self._workers:
            number, call = next(self._numbers), self._waiting.popleft()
            call.started = time.monotonic()
            self._next_deadline = min(self._next_deadline, call.started + call.timeout_s)
            self._running[number] = call
            self._started.put((number, call))
            if len(self._running) > self._threads:
                self._threads += 1
                queues = (self._started, self._answers)  # not the pool itself, which would live as long as the thread
                threading.Thread(target=_work, args=queues, daemon=True, name="appo-tool").start()

    def _give_up(self, number: int) -> _Call[K]:
        call = self._running.pop(number)
        call.given_up = True
        self._threads -= 1  # its thread may hang for ever
        _interrupt_aside(call)
        return call

    def _answered(self, wait_s: float) -> list[ToolOutcome[K]]:
        """Answers handed in, but for those of calls given up; waits for the first."""
        outcomes: list[ToolOutcome[K]] = []
        if wait_s > 0:
            with suppress(queue.Empty):
                self._take(*self._answers.get(timeout=wait_s), outcomes)
        while not self._answers.empty():  # no other thread takes any
            self._take(*self._answers.get(), outcomes)
        return outcomes

    def _take(self, number: int, answer: ToolOutcome[K] | AppoError, outcomes: list[ToolOutcome[K]]) -> None:
        if self._running.pop(number, None) is None:
            return
        if isinstance(answer, AppoError):
            raise answer
        outcomes.append(answer)

    def _expired(self, now: float) -> list[ToolOutcome[K]]:
        """Give up the calls whose time is over."""
        outcomes = []
        for number, call in list(self._running.items()):
            if now - call.started >= call.timeout_s:
                self._give_up(number)
                failure = ToolFailure(f"no answer within {call.timeout_s:g} seconds", kind="timeout")
                outcomes.append(ToolOutcome(call.key, str(failure), failure, now - call.started))
        self._next_deadline = min((call.started + call.timeout_s for call in self._running.values()), default=math.inf)
        return outcomes


def _work(started: queue.SimpleQueue[tuple[int, _Call] | None], answers: queue.SimpleQueue) -> None:
    while (next_call := started.get()) is not None:
        number, call = next_call
        if not call.given_up:
            answers.put((number, _answer(call)))
        if call.given_up:  # another thread has taken the place of this one
            return
        del next_call, call  # while it waits, a thread keeps nothing alive
    started.put(None)  # for the other threads


def _answer(call: _Call[K]) -> ToolOutcome[K] | AppoError:
    text, failure = "", None
    try:
        text = call.run()
        if not isinstance(text, str):
            raise TypeError(f"a tool must answer with text, got {type(text).__name__}")
    except ToolFailure as error:
        text, failure = str(error), error
    except AppoError as error:  # not this call but the tool is broken: the run must stop
        return error
    except BaseException as error:  # a user's tool may raise anything, SystemExit too; the policy reads it
        failure = ToolFailure(f"{type(error).__name__}: {error}")
        text = str(failure)
    return ToolOutcome(call.key, text, failure, time.monotonic() - call.started)


def _interrupt_aside(call: _Call) -> None:
    """Interrupting may itself hang or raise in a user's tool: it gets a thread of its own."""

    def interrupt() -> None:
        with suppress(Exception):  # the call is given up already
            call.interrupt()

    threading.Thread(target=interrupt, daemon=True, name="appo-tool-interrupt").start()
