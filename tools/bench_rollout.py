"""Measure the tool loop: against the bare engine, a lock-step loop, and rollouts without branches.

    python tools/bench_rollout.py --json runs/bench_rollout.json

The measured code is the package's ``RolloutLoop`` and ``VLLMSampler``. A wrapper around the sampler fixes how many
tokens each turn has and ends it with a tool call, so that every contestant does the same work whatever the policy
says. The contestants of a row take turns in one process on a new draw of the workload each round; a ratio is the median
of the ratios within a round. ``cpu`` is the ratio of the main thread's CPU seconds, which a busy machine changes less;
``idle`` the share of the time with requests in the engine that the loop spends outside the engine (its steps, and
vLLM's own taking in of requests). ``no wait`` is what the lock-step loop takes over what it would take if all its tools
answered at once: the ratio of a loop that hides all waiting and changes nothing else.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from appo_lightning.rollout.episode import Prefix
from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.rollout.loop import RolloutLoop
from appo_lightning.samplers.base import SampleRequest, generate
from appo_lightning.samplers.vllm import VLLMSampler
from appo_lightning.types import Task, Trajectory
from benchmarking import checkpoint_or_tiny, seconds, write_figures
from fixed_turns import PROMPT_TOKENS, FixedTurns, Workload, workload

MAX_LENGTH = 1024
POOL = 64  # tool calls at the same time, in both loops


class Bench:
    """The contestants, around one engine with ``slots`` sequences side by side."""

    def __init__(self, checkpoint: str, tokenizer: Any, slots: int) -> None:
        self.engine = VLLMSampler(max_num_seqs=slots)
        self.engine.start(checkpoint, tokenizer, max_length=MAX_LENGTH)
        self.engine._eos_token_ids = frozenset()  # a turn ends when the workload says so
        self.sampler = FixedTurns(self.engine, tokenizer)
        self._time_intake()
        limits = RolloutLimits(PROMPT_TOKENS, MAX_LENGTH - PROMPT_TOKENS, max_tool_calls=16, tool_workers=POOL)
        self.loop = RolloutLoop(self.sampler, [self.sampler.tool], tokenizer, limits)
        self.waited = 0.0  # for tools, by the last lock-step loop

    def _time_intake(self) -> None:
        engine: Any = self.engine._engine
        take_in = engine.add_request

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return take_in(*args, **kwargs)
            finally:
                self.sampler.seconds_in_engine += time.perf_counter() - began

        engine.add_request = timed

    def tasks(self, count: int) -> list[Task]:
        """Prompts without a common beginning."""
        return [Task(f"t{i}", [5 + (i * 7 + k * k) % 200 for k in range(PROMPT_TOKENS)], ()) for i in range(count)]

    def forget(self) -> None:
        """Empty the prefix cache: every run computes its own."""
        assert self.engine._engine is not None
        assert self.engine._engine.reset_prefix_cache()

    def run_loop(self, work: Workload) -> float:
        """Seconds of the package's loop."""
        self.forget()
        self.sampler.set_workload(work)
        prefixes = [Prefix(task, seed) for seed, task in enumerate(self.tasks(len(work.turns)))]
        return seconds(lambda: self.loop.run(prefixes, policy_version=0))

    def run_engine(self, work: Workload) -> float:
        """Seconds of vLLM's own step loop on the same tokens: results known at once, nothing parsed or recorded."""
        self.forget()
        self.sampler.set_workload(work)
        return seconds(lambda: self._drive_engine(work))

    def _drive_engine(self, work: Workload) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        engine = self.engine._engine
        assert engine is not None
        contexts = [list(task.prompt_ids) for task in self.tasks(len(work.turns))]
        turn_of = [0] * len(contexts)

        def submit(row: int) -> None:
            parameters = SamplingParams(
                max_tokens=work.turns[row][turn_of[row]],
                seed=row * 100 + turn_of[row],
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_clone=True,
            )
            engine.add_request(str(row), tokens_input(contexts[row]), parameters)

        for row in range(len(contexts)):
            submit(row)
        while engine.has_unfinished_requests():
            for output in engine.step():
                row = int(output.request_id)
                call = self.sampler.call_ids(row, turn_of[row])
                if call:
                    contexts[row] += [*output.outputs[0].token_ids[: -len(call)], *call, *self.sampler.result_ids]
                    turn_of[row] += 1
                    submit(row)

    def run_lock_step(self, work: Workload) -> float:
        """Seconds of the usual loop: generate all, then all tools in a pool, then generate all."""
        self.forget()
        self.sampler.set_workload(work)
        return seconds(lambda: self._drive_lock_step(work))

    def _drive_lock_step(self, work: Workload) -> None:
        tasks = self.tasks(len(work.turns))
        contexts = [list(task.prompt_ids) for task in tasks]
        live = list(range(len(tasks)))
        turn, self.waited = 0, 0.0
        with ThreadPoolExecutor(POOL) as pool:
            while live:
                requests = [SampleRequest(row, contexts[row], 1, row * 100 + turn, stop=("</wait>",)) for row in live]
                for row, completion in zip(live, generate(self.sampler, requests), strict=True):
                    contexts[row] += completion.token_ids
                live = [row for row in live if turn < len(work.turns[row]) - 1]
                calls = [(f"{row} {turn}", tasks[row]) for row in live]
                self.waited += seconds(lambda calls=calls: list(pool.map(self._call, calls)))  # type: ignore[misc]
                for row in live:
                    contexts[row] += self.sampler.result_ids
                turn += 1

    def _call(self, call: tuple[str, Task]) -> str:
        return self.sampler.tool.run(*call)

    def run_branches(
        self, work: Workload, *, roots: int, branches_per_root: int, branches_first: bool
    ) -> dict[str, float]:
        """Seconds of roots, of their branches, of as many further rollouts, and of all as new rollouts in one call.

        Args:
            work: a row for each root; its branches and the new rollouts repeat it.
            roots: of a prompt.
            branches_per_root: sampled in one call.
            branches_first: or the others first.
        """
        found: dict[str, float] = {}
        rows = list(range(len(work.turns)))
        tasks = [task for task in self.tasks(len(rows) // roots) for _ in range(roots)]

        def sample(name: str, prefixes: list[Prefix], rows: list[int]) -> list[Trajectory]:
            self.sampler.set_workload(work, rows)
            began = time.perf_counter()
            sampled = self.loop.run(prefixes, policy_version=0)
            found[name] = time.perf_counter() - began
            return sampled

        def new(seed: int, rows: list[int]) -> list[Prefix]:
            return [Prefix(tasks[row], seed + number) for number, row in enumerate(rows)]

        def sample_all_new() -> None:
            self.forget()
            all_rows = sorted(rows * (1 + branches_per_root))  # rollouts of a prompt side by side
            sample("grpo", new(2000, all_rows), all_rows)

        def sample_tree() -> None:
            self.forget()
            sampled = sample("roots", new(0, rows), rows)
            branch_rows = sorted(rows * branches_per_root)
            draw = random.Random(1)
            prefixes = [self._branch(tasks[row], row, sampled[row], draw) for row in branch_rows]
            sample("branches", prefixes, branch_rows)
            first = self.sampler.first_cached.values()
            found["cached"] = sum(cached for cached, _ in first) / sum(total for _, total in first)
            kept = sum(
                sum(sampled[row].sampled[: len(prefix.response_ids)])
                for row, prefix in zip(branch_rows, prefixes, strict=True)
            )
            found["token_share"] = 1 - kept / (branches_per_root * work.tokens)
            sample("independent", new(1000, branch_rows), branch_rows)

        for action in (sample_tree, sample_all_new)[:: 1 if branches_first else -1]:
            action()
        return found

    def _branch(self, task: Task, row: int, root: Trajectory, draw: random.Random) -> Prefix:
        # As the tree does: after a sampled token, with something left to say; not inside the call.
        possible = [t for t, sampled in enumerate(root.sampled) if sampled and self._may_branch(row, t + 1)]
        length = draw.choice(possible) + 1
        calls = [call for call in root.tool_calls if call.output_stop <= length]
        return Prefix(task, draw.randrange(1 << 30), root.response_ids[:length], calls)

    def _may_branch(self, row: int, length: int) -> bool:
        work = self.tool_workload
        end = sum(work.turns[row]) + len(self.sampler.result_ids) * (len(work.turns[row]) - 1)
        if length >= end:
            return False
        turn, left = self.sampler.turn_of(row, length)
        return left > len(self.sampler.call_ids(row, turn))

    @property
    def tool_workload(self) -> Workload:
        """The current workload."""
        return self.sampler.tool.workload


def compare(rounds: int, draw: Callable[[int], Workload], **contestants: Callable[[Workload], float]) -> dict[str, Any]:
    """Seconds of each contestant by round, in turns; the order is reversed every other round."""
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    tokens = []
    for number in range(rounds):
        work = draw(number)
        tokens.append(work.tokens)
        for name in list(contestants)[:: 1 if number % 2 == 0 else -1]:
            began = time.thread_time()
            measured[name].append(contestants[name](work))
            cpu[name].append(time.thread_time() - began)
    return {"tokens": tokens, "seconds": measured, "cpu_seconds": cpu}


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over rounds."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


class Table:
    """Rows, printed as they are measured.

    Args:
        bench: the contestants.
        rounds: of each row.
        only: parts of names; other rows are left out. Empty: all.
    """

    def __init__(self, bench: Bench, rounds: int, only: Sequence[str]) -> None:
        self._bench, self._rounds, self._only = bench, rounds, only
        self.rows: dict[str, dict[str, Any]] = {}
        print(f"{'':34}{'against':14}{'other, s':>9}{'loop, s':>9}{'ratio':>7}{'no wait':>9}{'cpu':>7}{'idle':>7}")

    def _wanted(self, name: str) -> bool:
        return not self._only or any(part in name for part in self._only)

    def compare(
        self, against: str, name: str, contestant: Callable[[Workload], float], count: int, **work: Any
    ) -> None:
        """The loop against one contestant, on ``workload(count, **work)``."""
        name = f"{name}, {count}"
        if not self._wanted(name):
            return
        idle: list[float] = []
        hidden: list[float] = []

        def other(drawn: Workload) -> float:
            taken = contestant(drawn)
            hidden.append(taken / (taken - self._bench.waited))
            return taken

        def loop(drawn: Workload) -> float:
            taken = self._bench.run_loop(drawn)
            idle.append(self._bench.sampler.idle_share)
            return taken

        work = {"turns": 4, "tools": None, **work}
        row = compare(self._rounds, lambda n: workload(count, **work, draw=n), other=other, loop=loop)
        row["ratio"] = ratio(row["seconds"]["other"], row["seconds"]["loop"])
        row["cpu_ratio"] = ratio(row["cpu_seconds"]["other"], row["cpu_seconds"]["loop"])
        if against == "lock step":
            row["no_wait_ratio"] = statistics.median(hidden)
        self._add(name, {**row, "against": against, "idle_share": statistics.median(idle)})

    def branches(self, name: str, roots: int, each: int, count: int, **work: Any) -> None:
        """Branches against as many new rollouts, and roots with branches against as many roots.

        Args:
            name: of the workload.
            roots: of a prompt.
            each: branches of a root.
            count: trajectories in all.
            work: as in ``workload``.
        """
        as_new, as_grpo = f"{each} a root, {name}", f"{roots} + {roots * each} a prompt, {name}"
        if not (self._wanted(as_new) or self._wanted(as_grpo)):
            return
        found = [
            self._bench.run_branches(
                workload(count // (1 + each), 4, draw=n, **work),
                roots=roots,
                branches_per_root=each,
                branches_first=n % 2 == 0,
            )
            for n in range(self._rounds)
        ]
        seconds = {key: [one[key] for one in found] for key in ("roots", "branches", "independent", "grpo")}
        tree = [a + b for a, b in zip(seconds["roots"], seconds["branches"], strict=True)]
        self._add(
            as_new,
            {
                "against": "new rollouts",
                "seconds": {"other": seconds["independent"], "loop": seconds["branches"]},
                "ratio": ratio(seconds["independent"], seconds["branches"]),
                "cached_prefix_share": statistics.median(one["cached"] for one in found),
                "sampled_token_share": statistics.median(one["token_share"] for one in found),
            },
        )
        self._add(
            as_grpo,
            {
                "against": "GRPO",
                "seconds": {"other": seconds["grpo"], "loop": tree},
                "ratio": ratio(seconds["grpo"], tree),
            },
        )

    def _add(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        other, loop = (statistics.median(row["seconds"][key]) for key in ("other", "loop"))
        line = f"{name:34}{row['against']:14}{other:9.2f}{loop:9.2f}{row['ratio']:7.2f}"
        line += f"{row['no_wait_ratio']:9.2f}" if "no_wait_ratio" in row else " " * 9
        # A loop that waits for tools burns no CPU time: only the bare engine does the same work.
        line += f"{row['cpu_ratio']:7.2f}" if row["against"] == "bare engine" else " " * 7
        print(line + (f"{row['idle_share']:7.1%}" if "idle_share" in row else ""), flush=True)
        if "cached_prefix_share" in row:
            print(f"{'  prefix tokens from the cache':48}{row['cached_prefix_share']:25.1%}")
            print(f"{'  tokens to sample, of a new rollout':48}{row['sampled_token_share']:25.1%}", flush=True)


def measure(bench: Bench, table: Table, *, sequences: int, many: int) -> None:
    """All rows."""
    tools = (0.05, 0.3)
    for count in (sequences, many):
        table.compare("bare engine", "one turn", bench.run_engine, count, turns=1)
    table.compare("bare engine", "4 turns, tools at once", bench.run_engine, sequences)
    table.compare("bare engine", "4 turns, 50-300 ms", bench.run_engine, many, tools=tools)
    for count in (sequences, many):
        lock_step = bench.run_lock_step
        table.compare("lock step", "4 turns each, 50-300 ms", lock_step, count, tools=tools)
        table.compare("lock step", "4 short turns, 50-300 ms", lock_step, count, tools=tools, length=(16, 48))
        table.compare("lock step", "1-7 turns, 50-300 ms", lock_step, count, tools=tools, vary=True)
        table.compare("lock step", "1-7 turns, one in 50 3 s", lock_step, count, tools=tools, vary=True, slow_every=50)
    for kind, name in ((None, "tools at once"), (tools, "50-300 ms")):
        for roots, each in ((8, 1), (4, 3)):
            table.branches(name, roots, each, many, tools=kind)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a transformers checkpoint; default: a random policy of 0.1M parameters")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--many", type=int, default=256, help="sequences where the tail should not count")
    parser.add_argument("--slots", type=int, default=64, help="sequences that the engine generates side by side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of rows to measure (default: all)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()

    from transformers import AutoTokenizer

    checkpoint = checkpoint_or_tiny(options.checkpoint, max_length=MAX_LENGTH)
    torch.set_num_threads(1)  # what VLLMSampler samples with
    bench = Bench(checkpoint, AutoTokenizer.from_pretrained(checkpoint), options.slots)
    for contestant in (bench.run_engine, bench.run_loop, bench.run_lock_step):
        contestant(workload(16, 2, tools=None))

    load = os.getloadavg()[0]
    table = Table(bench, options.rounds, options.only)
    measure(bench, table, sequences=options.sequences, many=options.many)
    figures = {
        "cores": os.cpu_count(),
        "load_average": load,
        "rounds": options.rounds,
        "slots": options.slots,
        "rows": table.rows,
    }
    write_figures(options.json, figures)
    bench.engine.close()


if __name__ == "__main__":
    main()
