"""Tool calls beside generation: bounded in number and in time, whatever a tool does."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from appo_lightning.errors import ToolFailure

K = TypeVar("K")


@dataclass(slots=True)
class ToolOutcome(Generic[K]):
    """How a call ended."""

    key: K
    text: str
    failure: ToolFailure | None
    seconds: float
    abandoned: bool = False  # the call may still be running: do not use its session again


@dataclass(slots=True)
class _Call(Generic[K]):
    key: K
    run: Callable[[], str]
    interrupt: Callable[[], None]
    timeout_s: float
    started: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)
    settled: bool = False


class ToolPool(Generic[K]):
    """Runs calls in daemon threads, at most ``workers`` at a time.

    A call that outlives its limit is interrupted and given up: its trajectory goes on with a time-out result, its slot
    is freed, and whatever it returns later is dropped. So a hung tool costs its own trajectory its own limit, no more.

    Args:
        workers: calls that run at the same time.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._waiting: deque[_Call[K]] = deque()
        self._running: dict[int, _Call[K]] = {}
        self._done: queue.SimpleQueue[ToolOutcome[K]] = queue.SimpleQueue()

    def __len__(self) -> int:
        """Calls submitted and not yet returned by ``poll``."""
        return len(self._waiting) + len(self._running)

    def submit(self, key: K, run: Callable[[], str], *, interrupt: Callable[[], None], timeout_s: float) -> None:
        """Queue a call; its time runs from the moment it starts."""
        self._waiting.append(_Call(key, run, interrupt, timeout_s))
        self._start_waiting()

    def poll(self, *, block: bool) -> list[ToolOutcome[K]]:
        """Calls that ended since the last poll.

        Args:
            block: wait until at least one ends (or none is left).
        """
        outcomes: list[ToolOutcome[K]] = []
        while True:
            self._expire()
            wait_s = self._seconds_to_next_deadline() if block and not outcomes and len(self) else 0.0
            try:
                while True:
                    outcomes.append(self._done.get(timeout=wait_s) if wait_s > 0 else self._done.get_nowait())
                    wait_s = 0.0
            except queue.Empty:
                pass
            if self._reap():
                self._start_waiting()
            if outcomes or not block or not len(self):
                return outcomes

    def abandon(self) -> None:
        """Give up everything: for the end of an interrupted run."""
        self._waiting.clear()
        for call in list(self._running.values()):
            self._settle(call, None)
            _interrupt_quietly(call)
        self._running.clear()

    def _start_waiting(self) -> None:
        while self._waiting and len(self._running) < self._workers:
            call = self._waiting.popleft()
            call.started = time.monotonic()
            self._running[id(call)] = call
            threading.Thread(target=self._work, args=(call,), daemon=True, name="appo-tool").start()

    def _work(self, call: _Call[K]) -> None:
        text, failure = "", None
        try:
            text = call.run()
        except ToolFailure as error:
            text, failure = str(error), error
        except Exception as error:  # a user's tool may raise anything; the policy reads it, the run goes on
            failure = ToolFailure(f"{type(error).__name__}: {error}")
            text = str(failure)
        self._settle(call, ToolOutcome(call.key, text, failure, time.monotonic() - call.started))

    def _settle(self, call: _Call[K], outcome: ToolOutcome[K] | None) -> bool:
        """Exactly one of the worker and the clock may end a call."""
        with call.lock:
            if call.settled:
                return False
            call.settled = True
            if outcome is not None:
                self._done.put(outcome)
            return True

    def _expire(self) -> None:
        now = time.monotonic()
        for call in list(self._running.values()):
            if now - call.started < call.timeout_s or call.settled:
                continue
            failure = ToolFailure(f"no answer within {call.timeout_s:g} seconds", kind="timeout")
            if self._settle(call, ToolOutcome(call.key, str(failure), failure, now - call.started, abandoned=True)):
                _interrupt_quietly(call)

    def _reap(self) -> bool:
        ended = [ident for ident, call in self._running.items() if call.settled]
        for ident in ended:
            del self._running[ident]
        return bool(ended)

    def _seconds_to_next_deadline(self) -> float:
        now = time.monotonic()
        left = [call.started + call.timeout_s - now for call in self._running.values() if not call.settled]
        return max(0.0005, min(left, default=0.0005))


def _interrupt_quietly(call: _Call) -> None:
    """Interrupting may itself hang or raise in a user's tool: it gets a thread of its own."""

    def interrupt() -> None:
        try:
            call.interrupt()
        except Exception:  # the call is given up already
            return

    threading.Thread(target=interrupt, daemon=True, name="appo-tool-interrupt").start()
