"""Asking math-verify from any thread, in bounded time: a worker process answers, the kernel ends it when it hangs.

math-verify bounds its own time by signals, which works in main threads only and cannot interrupt a big power in C.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import weakref
from typing import Any

from appo_lightning.errors import ConfigurationError


class EquivalenceChecker:
    """Decides whether two mathematical expressions are equivalent; safe to share between threads and to copy.

    The worker starts at the first question and again after a comparison that ran out of time or memory.

    Args:
        timeout_seconds: CPU seconds for one comparison, > 0; CPU time, so that a busy machine changes no verdict.

    Raises:
        ConfigurationError: timeout_seconds is not a positive finite number.
    """

    def __init__(self, timeout_seconds: float = 3.0) -> None:
        if not (math.isfinite(timeout_seconds) and timeout_seconds > 0):
            raise ConfigurationError(f"timeout_seconds must be > 0, got {timeout_seconds}: use 3")
        self.timeout_seconds = timeout_seconds
        self._forget_worker()

    def equivalent(self, reference: str, answer: str) -> bool:
        """Compare an answer with a reference; False where either cannot be read or the time runs out.

        Raises:
            RuntimeError: the worker cannot start, as when math-verify is not installed.
        """
        if answer.strip() == reference.strip():
            return bool(answer.strip())
        if self._owner != os.getpid():
            # After a fork the pipes belong to the parent: two processes must not share one worker.
            self._forget_worker()
        with self._lock:
            return self._ask(reference, answer)

    def __getstate__(self) -> dict[str, Any]:
        return {"timeout_seconds": self.timeout_seconds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.timeout_seconds = state["timeout_seconds"]
        self._forget_worker()

    def _forget_worker(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None

    def _ask(self, reference: str, answer: str) -> bool:
        if self._worker is None or self._worker.poll() is not None:
            self._worker = self._start_worker()
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        try:
            self._worker.stdin.write(json.dumps([reference, answer]) + "\n")
            self._worker.stdin.flush()
            verdict = self._worker.stdout.readline()
        except BrokenPipeError:
            verdict = ""
        if not verdict:
            # The worker was ended by its time or memory limit: no verdict within the budget is a wrong answer.
            self._stop_worker()
            self._worker = None
            return False
        return bool(json.loads(verdict))

    def _start_worker(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "appo_lightning.rewards.equivalence_worker", str(self.timeout_seconds)]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._stop_worker = weakref.finalize(self, _stop, worker)
        assert worker.stdout is not None
        if worker.stdout.readline() != "ready\n":
            self._stop_worker()
            raise RuntimeError(
                f"the math-verify worker must start, got exit status {worker.returncode}: see its error above and "
                "check that math-verify is installed"
            )
        return worker


def _stop(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    for pipe in (worker.stdin, worker.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):  # an unsent question dies with the worker
            pipe.close()
    worker.wait()
