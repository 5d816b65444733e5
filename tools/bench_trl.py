"""A training step of this package beside one of TRL's GRPOTrainer: same policy, prompts, group size and token counts.

    python tools/bench_trl.py --json runs/bench_trl.json

TRL gets an environment of its own under runs/. Each contestant is a process; they take turns, one training step each,
so that a busy machine slows all. Configurations of both sides: tools/bench_trl/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ROOT / "tools" / "bench_trl"
sys.path.insert(0, str(PARTS))

from agreement import Workload, workload  # noqa: E402

from benchmarking import write_figures  # noqa: E402

TURN_TOKENS = 32  # of a case with tools
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """What is compared with what, and the ratio that is wanted of the first two."""

    title: str
    wanted: float
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    rounds: int


CASES = {
    "tools": Case("4 turns, tools 50-300 ms, tiny policy", 3.0, ("trl", "trl-pool"), ("appo-vllm",), rounds=5),
    "large": Case("1 turn, policy of 34 million", 1.2, ("trl",), ("appo-vllm",), rounds=3),
    "tiny": Case("1 turn, tiny policy", 1.0, ("trl",), ("appo-transformers", "appo-vllm"), rounds=7),
}
NAMES = {
    "trl": "TRL",
    "trl-pool": "TRL, tools in a pool",
    "appo-vllm": "vLLM",
    "appo-transformers": "transformers",
}
SAMPLERS = {"appo-vllm": "VLLMSampler", "appo-transformers": "TransformersSampler"}


# --- contestants -----------------------------------------------------------------------------------------------------


class Contestant:
    """A process that does one training step at a time."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.name, self._log = name, log
        reading, writing = os.pipe()
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, "BENCH_REPORT_FD": str(writing)},
                pass_fds=(writing,),
                cwd=ROOT,
                text=True,
            )
        os.close(writing)
        self._reports = os.fdopen(reading)
        self.versions: dict[str, str] = self._report()["ready"]["versions"]

    def step(self) -> dict[str, Any]:
        """One training step: its seconds and counts."""
        self._say("step")
        return self._report()

    def stop(self) -> None:
        """Let it end by itself, or end it."""
        if self._process.poll() is None:
            self._say("stop")
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._reports.close()

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are in the log

    def _report(self) -> dict[str, Any]:
        line = self._reports.readline()
        if not line:
            tail = "\n".join(self._log.read_text().splitlines()[-15:])
            raise SystemExit(f"{self.name} ended with {self._process.wait()}; the end of {self._log}:\n{tail}")
        return json.loads(line)


def start(case: str, contestant: str, folder: Path, trl_python: Path, *, threads: int, steps: int) -> Contestant:
    """A contestant, up to its first step."""
    environment = {
        **os.environ,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(PARTS),
    }
    if contestant in CASES[case].theirs:
        command = [str(trl_python), str(PARTS / "run_trl.py"), case, str(folder), str(steps)]
        command += ["--pool"] if contestant == "trl-pool" else []
    else:
        command = [
            *(str(Path(sys.executable).with_name("appo")), "fit"),
            *("--config", str(PARTS / "appo" / "base.yaml"), "--config", str(PARTS / "appo" / f"{case}.yaml")),
            *("--model.policy.path", str(folder / "policy"), "--output_dir", str(folder / contestant)),
            *(
                f"--data.{part}.init_args.path={folder / 'policy' / 'prompts.jsonl'}"
                for part in ("train", "validation")
            ),
            *("--data.sampler", SAMPLERS[contestant], "--trainer.max_steps", str(steps)),
            "--trainer.callbacks+=appo_parts.StepClock",
        ]
        if contestant == "appo-transformers":  # all responses of a step in one batch, as TRL has them
            command += ["--data.sampler.max_batch_size", str(workload(case).sequences)]
    return Contestant(contestant, command, environment, folder / f"{contestant}.log")


def trl_environment(folder: Path, torch_index: str | None) -> Path:
    """The Python of an environment with TRL; made if it does not exist with these requirements."""
    requirements = PARTS / "requirements.txt"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    python, stamp = folder / "bin" / "python", folder / "requirements.sha256"
    if not (stamp.exists() and stamp.read_text() == wanted):
        print(f"Installing TRL into {folder}: about 1.5 GB, one to two minutes.", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        if torch_index:
            torch = next(line for line in requirements.read_text().splitlines() if line.startswith("torch=="))
            subprocess.run([*pip, torch, "--index-url", torch_index], check=True)
        subprocess.run([*pip, "-r", str(requirements)], check=True)
        stamp.write_text(wanted)
    return python


# --- measuring -------------------------------------------------------------------------------------------------------


def expected_counts(work: Workload) -> dict[str, int]:
    """What every step of every contestant must have done."""
    # All turns but the last end with a call, whose result is not sampled.
    results = work.response_tokens - TURN_TOKENS * (work.tool_calls + 1) if work.tool_calls else 0
    return {
        "sequences": work.sequences,
        "prompt_tokens": work.sequences * PROMPT_TOKENS,
        "response_tokens": work.sequences * work.response_tokens,
        "sampled_tokens": work.sequences * (work.response_tokens - results),
        "tool_calls": work.sequences * work.tool_calls,
        "tool_failures": 0,
    }


def measure(contestants: list[Contestant], work: Workload, *, warm_up: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each contestant by round; they take turns, in reverse order every other round.

    Raises:
        SystemExit: one of them did not do the work.
    """
    wanted = expected_counts(work)
    seconds: dict[str, list[float]] = {one.name: [] for one in contestants}
    for number in range(-warm_up, rounds):
        for one in contestants[:: 1 if number % 2 == 0 else -1]:
            report = one.step()
            found = {name: report[name] for name in wanted}
            if found != wanted:
                raise SystemExit(f"{one.name} did other work: expected {wanted}, found {found}")
            if number >= 0:
                seconds[one.name].append(report["seconds"])
    return seconds


def run_case(name: str, options: argparse.Namespace, trl_python: Path) -> dict[str, Any]:
    """All figures of a case."""
    from policy import save

    case, work = CASES[name], workload(name)
    folder = options.folder.resolve() / name
    (folder / "policy").mkdir(parents=True, exist_ok=True)
    parameters = save(folder / "policy", name, turn_tokens=TURN_TOKENS if work.tool_calls else 0)
    rounds = options.rounds or case.rounds
    contestants: list[Contestant] = []
    try:
        for one in (*case.theirs, *case.ours):
            steps = options.warm_up + rounds + 1  # the last one never happens
            contestants.append(start(name, one, folder, trl_python, threads=options.threads, steps=steps))
        load = os.getloadavg()[0]
        seconds = measure(contestants, work, warm_up=options.warm_up, rounds=rounds)
    finally:
        for contestant in contestants:
            contestant.stop()
    return {
        "title": case.title,
        "wanted": case.wanted,
        "parameters": parameters,
        "work": expected_counts(work),
        "load_average": [load, os.getloadavg()[0]],
        "versions": {one.name: one.versions for one in contestants},
        "seconds": seconds,
        "median_seconds": {one: statistics.median(values) for one, values in seconds.items()},
        "ratios": [
            {
                "theirs": theirs,
                "ours": ours,
                "rounds": [a / b for a, b in zip(seconds[theirs], seconds[ours], strict=True)],
            }
            for theirs in case.theirs
            for ours in case.ours
        ],
    }


# --- telling ---------------------------------------------------------------------------------------------------------


def table(cases: dict[str, dict[str, Any]]) -> str:
    """Seconds per step, and TRL's over ours."""
    title = f"{'seconds per training step':40}{'theirs':22}{'ours':13}"
    lines = [f"{title}{'theirs':>7}{'ours':>7}{'ratio':>7}{'lowest':>8}{'highest':>9}{'wanted':>8}"]
    for case in cases.values():
        median, title = case["median_seconds"], case["title"]
        for row in case["ratios"]:
            theirs, ours, rounds = row["theirs"], row["ours"], row["rounds"]
            wanted = f"{case['wanted']:.1f}" if theirs == "trl" else ""
            lines.append(
                f"{title:40}{NAMES[theirs]:22}{NAMES[ours]:13}{median[theirs]:7.2f}{median[ours]:7.2f}"
                f"{statistics.median(rounds):7.2f}{min(rounds):8.2f}{max(rounds):9.2f}{wanted:>8}"
            )
            title = ""
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    return {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, help="measured steps of each contestant; default: 3 to 7, by case")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before those that count")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of every contestant")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "bench" / "trl", help="policies, runs and logs")
    parser.add_argument("--venv", type=Path, default=ROOT / "runs" / "bench" / "trl-venv", help="TRL's environment")
    parser.add_argument("--torch-index", help="where pip finds the CPU build of torch, if not in its own index")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--show", type=Path, nargs="+", help="measure nothing: print the table of such files")
    options = parser.parse_args()
    if options.show:
        print(
            table({name: case for path in options.show for name, case in json.loads(path.read_text())["cases"].items()})
        )
        return
    trl_python = trl_environment(options.venv.resolve(), options.torch_index)
    cases = {name: run_case(name, options, trl_python) for name in options.cases}
    print(table(cases))
    figures = {"machine": machine(), "threads": options.threads, "cases": cases}
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
