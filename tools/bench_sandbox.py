"""Measure what the Python tool costs: a call, a session, a branch, the start of its server; with and without its walls.

    python tools/bench_sandbox.py --json runs/bench_sandbox.json

The variants take turns in one process, so that a busy machine slows all; each figure is the median over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

from appo_lightning.rollout.sessions import EpisodeSession
from appo_lightning.tools._sandbox.client import WALLS
from appo_lightning.tools.python import PythonTool
from appo_lightning.types import Task, ToolCall
from benchmarking import machine, write_figures

TASK = Task("bench", [1], ("x",))
# What full protection costs is the first against the last, which runs the same code without walls.
VARIANTS = {"all walls": WALLS, "no namespaces": ("landlock", "seccomp"), "no walls": ()}
FIGURES = {
    "call_ms": "call of 1+1, ms",
    "slow_call_ms": "the slowest of 100, ms",
    "calls_per_second": "calls/s, {threads} sessions",
    "ready_session_ms": "session and first call, one ready, ms",
    "new_session_ms": "session and first call, none ready, ms",
    "sessions_per_second": "sessions/s, one after another",
    "branch_1_ms": "branch after 1 call, its own call too, ms",
    "branch_4_ms": "branch after 4 calls, likewise, ms",
    "branch_16_ms": "branch after 16 calls, likewise, ms",
    "server_ms": "start of the server, ms",
}
PREFIXES = (1, 4, 16)


def milliseconds(action: Callable[[], object]) -> float:
    """Wall clock of one call."""
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1000


def make_tool(walls: tuple[str, ...], warm_sessions: int) -> PythonTool:
    """A tool that uses some of the walls only."""
    tool = PythonTool(allow_unsafe=True, warm_sessions=warm_sessions)
    tool._server._walls = walls
    return tool


def first_call(tool: PythonTool) -> None:
    """One session with one call, to the end."""
    session = tool.open(TASK)
    session.call("1+1")
    session.close()


def calls_per_second(tool: PythonTool, threads: int, seconds: float) -> float:
    """Calls of all threads together, each with a session of its own."""
    counts = [0] * threads
    sessions = [tool.open(TASK) for _ in range(threads)]
    for session in sessions:
        session.call("1+1")
    end = time.perf_counter() + seconds

    def work(index: int) -> None:
        while time.perf_counter() < end:
            sessions[index].call("1+1")
            counts[index] += 1

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for session in sessions:
        session.close()
    return sum(counts) / seconds


def branch_ms(tool: PythonTool, calls: int, branches: int) -> float:
    """A branch's first call behind so many calls of its root, which are repeated in a session of its own."""
    code = "import math; values = [math.sqrt(n) for n in range(100)]; values[-1]"
    prefix = [ToolCall("python", code, "", 0, 0, succeeded=True, seconds=0.0) for _ in range(calls)]

    def branch() -> None:
        session = EpisodeSession(tool, TASK, prefix)
        session.call("values[0]")
        session.close()

    times = []
    for _ in range(branches):
        time.sleep(0.05)
        times.append(milliseconds(branch))
    return statistics.median(times)


def measure(walls: tuple[str, ...], *, calls: int, sessions: int, threads: int, seconds: float) -> dict[str, float]:
    """One round of one variant."""
    tool = make_tool(walls, warm_sessions=4)
    found = {"server_ms": milliseconds(tool.protections)}
    session = tool.open(TASK)
    session.call("1+1")
    times = [milliseconds(lambda: session.call("1+1")) for _ in range(calls)]
    session.close()
    found["call_ms"] = statistics.median(times)
    found["slow_call_ms"] = statistics.quantiles(times, n=100)[-1]
    found["calls_per_second"] = calls_per_second(tool, threads, seconds)

    ready = []
    for _ in range(sessions):
        time.sleep(0.05)  # as between two trajectories: time to make the next one ready
        ready.append(milliseconds(lambda: first_call(tool)))
    found["ready_session_ms"] = statistics.median(ready)
    found |= {f"branch_{calls}_ms": branch_ms(tool, calls, sessions) for calls in PREFIXES}
    tool.close()

    tool = make_tool(walls, warm_sessions=0)
    first_call(tool)
    new = [milliseconds(lambda: first_call(tool)) for _ in range(sessions)]
    found["new_session_ms"] = statistics.median(new)
    found["sessions_per_second"] = 1000 * sessions / sum(new)
    tool.close()
    return found


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--sessions", type=int, default=50)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()

    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(options.rounds):
        for name, walls in VARIANTS.items():
            rounds[name].append(
                measure(
                    walls,
                    calls=options.calls,
                    sessions=options.sessions,
                    threads=options.threads,
                    seconds=options.seconds,
                )
            )
    found = {
        name: {figure: statistics.median(one[figure] for one in measured) for figure in FIGURES}
        for name, measured in rounds.items()
    }
    print(f"{'':44}" + "".join(f"{name:>16}" for name in VARIANTS))
    for figure, label in FIGURES.items():
        digits = 0 if figure.endswith("_per_second") else 2
        values = "".join(f"{found[name][figure]:16,.{digits}f}" for name in VARIANTS)
        print(f"{label.format(threads=options.threads):44}{values}")
    result = {
        **machine(),
        "rounds": options.rounds,
        "threads": options.threads,
        "variants": found,
    }
    write_figures(options.json, result)


if __name__ == "__main__":
    main()
