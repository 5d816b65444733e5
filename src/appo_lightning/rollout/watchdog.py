"""Nothing hangs for ever: an engine that samples no token within a stated time is given up."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from appo_lightning.errors import EngineFailure

T = TypeVar("T")

# Not the signal of Ctrl-C: a process in the background of a script ignores that one, and a user may send it.
_SIGNAL = signal.SIGUSR2


class _Stalled(BaseException):
    """Raised in the main thread out of a step that takes too long; no handler of an engine should swallow it."""


class Watchdog:
    """Watches the progress of an engine.

    Two ways to hang: steps that return and sample nothing (``look``), and a step that does not return (``guard``). The
    second is interrupted by a signal; code that cannot be interrupted, such as a hung kernel, ends the
    process with one line after a grace.

    Args:
        limit_s: longest time without a token.
        grace_s: seconds that an interrupted step has to end.
    """

    def __init__(self, limit_s: float, grace_s: float = 30.0) -> None:
        self._limit_s, self._grace_s = limit_s, grace_s
        self._look_again_s = min(1.0, limit_s / 4)
        self._seen = -1
        self._since = self._next_look = time.monotonic()
        self._entered: float | None = None
        self._fired = False
        self._stop = threading.Event()

    def rest(self) -> None:
        """Something happened, or the engine has nothing to do: count from now."""
        self._since = time.monotonic()

    def look(self, progress: int) -> None:
        """Compare the progress with that of the last look.

        Raises:
            EngineFailure: nothing happened for longer than the limit.
        """
        now = time.monotonic()
        self._next_look = now + self._look_again_s
        if progress != self._seen:
            self._seen, self._since = progress, now
        elif now - self._since > self._limit_s:
            self._since = now
            raise EngineFailure(self._message())

    @property
    def due(self) -> bool:
        """Whether it is time to look: looking has a cost."""
        return time.monotonic() >= self._next_look

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Run the thread that watches ``guard``; only the main thread can be interrupted."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(_SIGNAL, self._interrupt)
        threading.Thread(target=self._watch, daemon=True, name="appo-watchdog").start()
        try:
            yield
        finally:
            self._stop.set()
            signal.signal(_SIGNAL, signal.SIG_DFL if previous is None else previous)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._entered is not None and self._fired:  # else the step has just returned
            raise _Stalled

    def guard(self, step: Callable[[], T]) -> T:
        """Run a step of the engine.

        Raises:
            EngineFailure: the step took longer than the limit and was interrupted.
        """
        self._entered = time.monotonic()
        try:
            return step()
        except _Stalled as error:
            raise EngineFailure(self._message()) from error
        finally:
            self._entered, self._fired = None, False

    def _message(self) -> str:
        return f"the engine sampled no token for {self._limit_s:g} seconds (data.rollout.stall_timeout_s)"

    def _watch(self) -> None:
        while not self._stop.wait(self._look_again_s):
            entered = self._entered
            if entered is None or time.monotonic() - entered <= self._limit_s:
                continue
            if not self._fired:
                self._fired = True
                signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
            elif time.monotonic() - entered > self._limit_s + self._grace_s:
                print(f"error: {self._message()} and cannot be interrupted", file=sys.stderr, flush=True)
                os._exit(1)
