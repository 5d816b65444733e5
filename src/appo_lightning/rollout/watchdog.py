"""Nothing hangs for ever: an engine that samples no token within a stated time is given up."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
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

    The thread that sends the signal lives as long as the watchdog: on a busy machine each start of one is waited for,
    some milliseconds long.

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
        self._has_thread = False

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
        """Let the signal end what ``guard`` runs; only the main thread can be interrupted."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(_SIGNAL, self._interrupt)
        if not self._has_thread:
            self._has_thread = True
            arguments = (weakref.ref(self), self._look_again_s)
            threading.Thread(target=_watch, args=arguments, daemon=True, name="appo-watchdog").start()
        try:
            yield
        finally:
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

    def _check_step(self) -> None:
        """Called from the thread that watches: end a step that takes too long."""
        entered = self._entered
        if entered is None or time.monotonic() - entered <= self._limit_s:
            return
        if not self._fired:
            self._fired = True
            signal.pthread_kill(threading.main_thread().ident or 0, _SIGNAL)
        elif time.monotonic() - entered > self._limit_s + self._grace_s:
            print(f"error: {self._message()} and cannot be interrupted", file=sys.stderr, flush=True)
            os._exit(1)


def _watch(reference: weakref.ref[Watchdog], look_again_s: float) -> None:
    while True:
        time.sleep(look_again_s)
        watchdog = reference()
        if watchdog is None:
            return
        watchdog._check_step()
        del watchdog  # while it sleeps, the thread keeps nothing alive
