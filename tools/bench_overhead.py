"""Where the seconds of a training step go: `appo fit` as users run it, watched from outside.

    python tools/bench_overhead.py --policy runs/quickstart/sft_policy --json runs/bench_overhead.json

Two settings: the quick start, and responses of 1,000 tokens by a random policy that never ends its turn. Each runs in a
process of its own. Functions of the package, of Lightning and of torch are wrapped, so that every moment of the main
thread belongs to exactly one row: that of the innermost wrapped function that is running. What no row claims is
Lightning's. A weight push and the checks after it have two rows each: what the engine and the policy do in them, and
the rest. The clock starts after whole phases that warm up, and runs for whole phases. What the watching itself takes
is measured afterwards and taken out of the rows.

In the loop the main thread waits for nothing of its own. Where its clock goes on and its CPU time does not, a tool's
thread holds the interpreter or a tool's process the core: the row "loop: tools". The control is the engine, which on a
CPU computes in the same thread, in the second setting, where no tool is called: "engine waits" is 0 there.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarking import machine, write_figures

BESIDE = "loop: tools"  # what tools beside the loop take from it
USEFUL = ("engine", "tools", BESIDE, "forward", "forward and backward", "optimiser")
SEALED = ("weight push", "sync checks")  # own what happens inside
INSIDE = {row: f"{row}: engine, policy" for row in SEALED}  # the engine's steps and packing, the policy's forward pass
ROWS = (
    *USEFUL,
    *INSIDE.values(),
    *SEALED,
    *("loop", "reward", "plan and batch", "statistics", "progress bar", "checkpoint", "Lightning"),
)

# Where: module, attribute; row, or how to tell it from the arguments.
WATCHED: list[tuple[str, str, str]] = [
    ("appo_lightning.samplers.vllm", "VLLMSampler.step", "engine"),
    ("appo_lightning.samplers.vllm", "VLLMSampler.submit", "engine"),
    ("appo_lightning.samplers.vllm", "VLLMSampler.load_weights", "weight push"),
    ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", "engine"),
    ("appo_lightning.callbacks.weight_sync", "SamplerWeightSync._read_and_ask", "sync checks"),
    ("appo_lightning.callbacks.weight_sync", "SamplerWeightSync._compare", "sync checks"),
    ("appo_lightning.rollout.loop", "RolloutLoop.run", "loop"),
    # Only a wait in which no rollout can go on is the tools': a look at what has ended is the loop's.
    ("appo_lightning.rollout.loop", "RolloutLoop._wait_for_tools", "tools"),
    ("appo_lightning.rollout.closer", "Closer.wait", "tools"),  # all rollouts are over, some sessions are not
    ("appo_lightning.rollout.runner", "score_rewards", "reward"),
    ("appo_lightning.rollout.runner", "plan_branches", "plan and batch"),
    ("appo_lightning.rollout.runner", "build_batch", "plan and batch"),
    ("appo_lightning.sources", "RolloutSource._draw", "plan and batch"),
    ("appo_lightning.callbacks.advantage_scaling", "ProcedureAdvantageScaling.on_train_batch_start", "plan and batch"),
    ("appo_lightning.module", "AppoModule.training_step", "plan and batch"),
    ("appo_lightning.module", "log_metrics", "statistics"),
    ("appo_lightning.callbacks.statistics", "RolloutStatistics.on_train_batch_end", "statistics"),
    ("appo_lightning.callbacks.statistics", "BranchStatistics.on_train_batch_end", "statistics"),
    ("appo_lightning.callbacks.statistics", "CreditStatistics.on_train_batch_end", "statistics"),
    ("appo_lightning.callbacks.tool_efficiency", "ToolCallEfficiency.on_train_batch_end", "statistics"),
    ("appo_lightning.callbacks.weight_sync", "SamplerWeightSync.on_train_batch_end", "statistics"),
    ("appo_lightning.callbacks.progress", "RolloutProgressBar.rollout", "progress bar"),
    ("appo_lightning.callbacks.progress", "RolloutProgressBar.on_train_batch_end", "progress bar"),
    ("appo_lightning.policy.causal_lm", "CausalPolicy.score", "forward and backward"),
    ("appo_lightning.module", "AppoModule._loss", "forward and backward"),
    ("lightning.pytorch", "LightningModule.manual_backward", "forward and backward"),
    ("torch.optim", "AdamW.step", "optimiser"),
    ("torch.optim", "AdamW.zero_grad", "optimiser"),
    ("appo_lightning.policy_module", "PolicyModule._clip_gradients", "optimiser"),
    ("lightning.pytorch", "Trainer.save_checkpoint", "checkpoint"),
]


class Clock:
    """Gives each moment of the main thread to one row, and the CPU time that the thread had in it.

    The difference is what it waited for: other processes and its own tool threads want the cores too.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.cpu_seconds: Counter[str] = Counter()
        self.claims: Counter[tuple[str, str]] = Counter()  # by the row that was left and the one that was entered
        self._rows = ["Lightning"]
        self._since: tuple[float, float] | None = None  # None: stopped
        self._thread = threading.get_ident()

    def start(self) -> None:
        self._since = time.perf_counter(), time.thread_time()

    def stop(self) -> None:
        self._book()
        self._since = None

    def _book(self) -> None:
        if self._since is not None:
            now = time.perf_counter(), time.thread_time()
            self.seconds[self._rows[-1]] += now[0] - self._since[0]
            self.cpu_seconds[self._rows[-1]] += now[1] - self._since[1]
            self._since = now

    def claim(self, row: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function whose time belongs to a row."""
        outer = self._rows[-1]
        if outer in SEALED:
            row = INSIDE[outer] if row in USEFUL else outer
        if threading.get_ident() != self._thread or row == outer or outer in INSIDE.values():
            return function(*args, **options)
        self._book()
        if self._since is not None:
            self.claims[outer, row] += 1
        self._rows.append(row)
        try:
            return function(*args, **options)
        finally:
            self._book()
            self._rows.pop()

    def give_waits_to_tools(self) -> None:
        """Leave the loop what it computes."""
        waited = max(0.0, self.seconds["loop"] - self.cpu_seconds["loop"])
        self.seconds["loop"] -= waited
        self.seconds[BESIDE] += waited

    def take_out_claims(self) -> None:
        """Take out of the rows what claiming them took, measured on calls of nothing."""
        idle, calls = Clock(), 20_000
        idle._rows = ["outer"]
        idle.start()
        for _ in range(calls):
            idle.claim("inner", bool)
        idle.stop()
        for (outer, inner), count in self.claims.items():
            for row, side in ((outer, "outer"), (inner, "inner")):
                self.seconds[row] -= count * idle.seconds[side] / calls
                self.cpu_seconds[row] -= count * idle.cpu_seconds[side] / calls


def watch(clock: Clock) -> None:
    """Wrap what is watched."""
    import torch

    def wrap(owner: Any, name: str, row_of: Callable[..., str]) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*args: Any, **options: Any) -> Any:
            return clock.claim(row_of(options), function, *args, **options)

        setattr(owner, name, wrapped)

    for module, path, row in WATCHED:
        owner: Any = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        if path == "CausalPolicy.score":
            wrap(owner, name, lambda _: "forward and backward" if torch.is_grad_enabled() else "forward")
        else:
            wrap(owner, name, lambda _, row=row: row)


def measure(arguments: list[str], *, warm_up: int, steps: int) -> dict[str, Any]:
    """Run `appo fit` and give the seconds of each row, over ``steps`` mini-batches behind the first ``warm_up``."""
    import lightning as L

    from appo_lightning import lightning_cli

    clock = Clock()
    tokens: list[float] = []

    class Window(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == warm_up:
                clock.start()
            elif trainer.global_step > warm_up:
                tokens.extend(len(root.response_ids) for tree in batch.trees for root in tree.roots)
            if trainer.global_step == warm_up + steps:
                clock.stop()

    fixed = lightning_cli.AppoCLI._fixed_callbacks
    lightning_cli.AppoCLI._fixed_callbacks = lambda self: [*fixed(self), Window()]  # type: ignore[method-assign]
    watch(clock)
    lightning_cli.run("fit", [*arguments, "--trainer.max_steps", str(warm_up + steps)])
    clock.take_out_claims()
    clock.give_waits_to_tools()
    total, cpu_total = sum(clock.seconds.values()), sum(clock.cpu_seconds.values())
    overhead = 1 - sum(clock.seconds[row] for row in (*USEFUL, *INSIDE.values())) / total
    waits = clock.seconds[BESIDE] / total
    return {
        "steps": steps,
        "seconds_per_step": total / steps,
        "response_tokens": sum(tokens) / len(tokens),
        "seconds": {row: clock.seconds[row] / steps for row in ROWS},
        "cpu_seconds": {row: clock.cpu_seconds[row] / steps for row in ROWS},
        "engine_waits": 1 - clock.cpu_seconds["engine"] / clock.seconds["engine"],
        "overhead_share": overhead,
        "cpu_overhead_share": 1 - sum(clock.cpu_seconds[row] for row in (*USEFUL, *INSIDE.values())) / cpu_total,
        "overhead_share_with_waits": overhead + waits,
        "overhead_share_with_pushes": overhead + waits + sum(clock.seconds[row] for row in INSIDE.values()) / total,
    }


def save_talkative_policy(directory: Path) -> None:
    """A random policy of 2.6 million parameters whose responses go on to their limit, without tool calls."""
    import torch
    from transformers import AutoModelForCausalLM

    from appo_lightning.tasks.lookup import create_tiny_policy
    from appo_lightning.tasks.lookup.tokenizer import build_tokenizer

    create_tiny_policy(directory, hidden_size=256, num_layers=4)
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(directory), build_tokenizer()
    policy.config.max_position_embeddings = 2048
    with torch.no_grad():
        # Every hidden state leans to one side, and the rows of these tokens to the other.
        embedding = policy.get_input_embeddings().weight
        embedding += 0.1
        tags = [token for token in tokenizer.get_vocab() if token.startswith("</")]
        for token in (tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(tags)):
            embedding[token] -= 2.0
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


SETTINGS: dict[str, dict[str, Any]] = {
    # A phase has four mini-batches; with 20 of them, two checkpoints are saved.
    "quick start": {"warm_up": 8, "steps": 20, "arguments": []},
    "1,000 tokens": {
        "warm_up": 2,
        "steps": 2,
        "arguments": [
            *("--data.rollout.max_response_tokens", "1000", "--data.prompts_per_phase", "4"),
            *("--data.prompts_per_mini_batch", "2", "--model.micro_batch_tokens", "16384"),
        ],
    },
}


def run_setting(name: str, policy: str, folder: str) -> dict[str, Any]:
    """``measure`` of one setting."""
    setting = SETTINGS[name]
    arguments = ["--config", "configs/quickstart/appo.yaml", "--model.policy.path", policy]
    arguments += ["--output_dir", f"{folder}/run", "--export.path", "null", *setting["arguments"]]
    return measure(arguments, warm_up=setting["warm_up"], steps=setting["steps"])


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """Seconds and shares by row."""
    print(f"{'seconds per mini-batch':30}" + "".join(f"{name:>24}" for name in results))
    for row in ROWS:
        cells = (
            f"{result['seconds'][row]:14.3f}{result['seconds'][row] / result['seconds_per_step']:10.1%}"
            for result in results.values()
        )
        print(f"{row:30}" + "".join(cells))
    print(f"{'all':30}" + "".join(f"{result['seconds_per_step']:14.3f}{1:10.1%}" for result in results.values()))
    shares = {
        "engine waits": "engine_waits",
        "all but engine, tools, policy": "overhead_share",
        "  by CPU time": "cpu_overhead_share",
        "  and the loop's waits": "overhead_share_with_waits",
        "  and pushes, checks whole": "overhead_share_with_pushes",
    }
    for name, key in shares.items():
        print(f"{name:30}" + "".join(f"{result[key]:24.1%}" for result in results.values()))
    print(f"{'tokens per response':30}" + "".join(f"{result['response_tokens']:24,.0f}" for result in results.values()))


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--policy", default="runs/quickstart/sft_policy", help="of the quick start, after its cold start"
    )
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_setting(*json.loads(options.case))))
        return
    results = {}
    for name in options.settings:
        with tempfile.TemporaryDirectory() as folder:
            policy = options.policy
            if name != "quick start":
                policy = f"{folder}/policy"
                save_talkative_policy(Path(policy))
            command = [sys.executable, __file__, "--case", json.dumps([name, policy, folder])]
            # As the appo command has it.
            environment = {"GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false", **os.environ}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            results[name] = json.loads(done.stdout.splitlines()[-1])
        figures = {**machine(), "settings": results}
        write_figures(options.json, figures)
    print_table(results)


if __name__ == "__main__":
    main()
