"""What both contestants share: reward, tool, and whose turn it is. The standard library only: each has its own venv."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

TOOL = "wait"
RESULT = "found w1 w2 w3 w4 w5"
SHORTEST, LONGEST = 0.05, 0.3  # seconds of a tool call


def even_words(text: str) -> float:
    """The reward: the share of even words, of ``w0 w1 w2 ...``. It differs between random responses."""
    numbers = [int(number) for number in re.findall(r" w([0-9]+)", text)]
    return sum(number % 2 == 0 for number in numbers) / max(1, len(numbers))


class SlowTool:
    """A tool of 50 to 300 ms. The n-th call of a step takes the n-th time, so that a step's calls take the same in sum.

    Args:
        calls_per_step: after so many the times begin anew.
    """

    def __init__(self, calls_per_step: int) -> None:
        # A fixed order that is not sorted: 7919 is prime to every size used here.
        places = [n * 7919 % calls_per_step for n in range(calls_per_step)]
        span = (LONGEST - SHORTEST) / max(1, calls_per_step - 1)
        self.delays = [SHORTEST + span * place for place in places]
        self.calls = 0
        self.seconds = 0.0
        self._lock = threading.Lock()

    def __call__(self) -> str:
        with self._lock:
            delay = self.delays[self.calls % len(self.delays)]
            self.calls += 1
            self.seconds += delay
        time.sleep(delay)
        return RESULT


class Turns:
    """A contestant's side of taking turns: one training step at each word of the referee.

    Speaks lines of JSON on a pipe of its own, because libraries print on stdout; listens on stdin.
    """

    def __init__(self) -> None:
        self._pipe = os.fdopen(int(os.environ["BENCH_REPORT_FD"]), "w")
        self._began = 0.0

    def ready(self, facts: dict[str, Any]) -> bool:
        """Tell what is about to run; wait for the first turn. False: there is none."""
        return self._say_and_wait({"ready": facts})

    def step_done(self, counts: Callable[[], dict[str, Any]]) -> bool:
        """Tell what the step did; wait for the next turn. False: that was the last one."""
        seconds = time.perf_counter() - self._began  # before counting, which is no part of a step
        return self._say_and_wait({"seconds": seconds, **counts()})

    def _say_and_wait(self, message: dict[str, Any]) -> bool:
        self._pipe.write(json.dumps(message) + "\n")
        self._pipe.flush()
        go = sys.stdin.readline().strip() == "step"
        self._began = time.perf_counter()
        return go
