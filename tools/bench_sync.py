"""Measure weight pushes: all weights, LoRA merged on the way, LoRA adapters as they are; and what their proof costs.

    python tools/bench_sync.py --json runs/bench_sync.json

First table: the three ways take turns in one process, each with vLLM engine and policy of the package. ``push`` is the
time to hand the weights over; ``read back`` that of comparing columns of every weight with what the engine computes
with, in a pass of its own; ``in a step`` how much longer a step of the engine takes that is read from, as the canary's
is; tokens/s that of sampling afterwards. Second table: training steps of the quick start's configuration, where
``sync/push_seconds`` and ``sync/check_seconds`` (reading back, and the canary) are set against ``time/step``. Figures
of the first are medians, of the second means.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from appo_lightning.policy.causal_lm import CausalPolicy
from appo_lightning.policy.options import LoraOptions, PolicyOptions
from appo_lightning.samplers.base import SampleRequest, generate
from appo_lightning.samplers.read_back import ReadBack
from appo_lightning.samplers.vllm import VLLMSampler
from appo_lightning.tasks.lookup import create_tiny_policy
from benchmarking import machine, write_figures

ROOT = Path(__file__).resolve().parents[1]
LORA = LoraOptions(rank=16, alpha=32.0)
WAYS = ("all weights", "LoRA, merged", "LoRA, adapter")
TABLES = ("pushes", "training")
COLUMNS = 4  # the default of sync.read_columns


@dataclass(frozen=True)
class Size:
    """A policy, and how much it samples in the benchmark."""

    name: str
    hidden: int
    layers: int
    sequences: int
    tokens: int
    steps: int  # of training; the first, which starts the engine, is not counted
    prompts: int  # per optimiser step
    steps_per_phase: int


SIZES = (Size("tiny", 128, 2, 64, 128, 9, 16, 4), Size("mid", 704, 8, 32, 32, 3, 1, 2))


class Way:
    """One way to push, with its policy and engine."""

    def __init__(self, name: str, checkpoint: str) -> None:
        self.name = name
        lora = None if name == "all weights" else LORA
        self.policy = CausalPolicy(PolicyOptions(checkpoint, lora=lora))
        self.sampler = VLLMSampler()
        if name == "LoRA, adapter":
            self.sampler.expect_adapter(LORA.rank)
        self.sampler.start(checkpoint, self.policy.tokenizer, max_length=256)
        self.seconds: dict[str, list[float]] = {
            name: [] for name in ("push", "read back", "step", "read step", "tokens/s")
        }

    def round(self, number: int, size: Size) -> None:
        """Move the weights, push, check, sample."""
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for _, parameter in self.policy.trainable():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)
        self._measure("push", self.push)
        read_back = ReadBack(COLUMNS, push=number)
        weights = self.policy.named_adapter() if self.name == "LoRA, adapter" else self.policy.named_weights()
        for _ in read_back.noting(weights):
            pass
        self._measure("read back", lambda: self._check(read_back, sampling=False))
        self._measure("step", self._sample_one)
        self._measure("read step", lambda: self._check(read_back, sampling=True))
        requests = [SampleRequest(i, [5, 6, 7, 8 + i % 50], size.tokens, seed=i) for i in range(size.sequences)]
        began = time.perf_counter()
        tokens = sum(len(completion.token_ids) for completion in generate(self.sampler, requests))
        self.seconds["tokens/s"].append(tokens / (time.perf_counter() - began))

    def push(self) -> None:
        """Hand the weights over."""
        if self.name == "LoRA, adapter":
            self.sampler.load_adapter(self.policy.named_adapter())
        else:
            self.sampler.load_weights(self.policy.named_weights())

    def _sample_one(self) -> None:
        generate(self.sampler, [SampleRequest(0, [5, 6], 1, seed=0, temperature=0.0)])

    def _check(self, read_back: ReadBack, *, sampling: bool) -> None:
        with read_back.comparing(self.sampler) as result:
            if sampling:
                self._sample_one()
        assert not result.different
        assert not result.unchecked

    def _measure(self, name: str, action: Callable[[], None]) -> None:
        began = time.perf_counter()
        action()
        self.seconds[name].append(time.perf_counter() - began)


def pushes(size: Size, checkpoint: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of the first table."""
    ways = [Way(name, checkpoint) for name in WAYS]
    for number in range(rounds + 1):
        for way in ways:
            way.round(number, size)
    rows = []
    for way in ways:
        figures = {name: statistics.median(values[1:]) for name, values in way.seconds.items()}  # the first warms up
        against = zip(way.seconds["tokens/s"][1:], ways[0].seconds["tokens/s"][1:], strict=True)
        figures["in a step"] = statistics.median(
            read - plain for read, plain in zip(way.seconds["read step"][1:], way.seconds["step"][1:], strict=True)
        )
        rows.append({"way": way.name, **figures, "ratio": statistics.median(own / plain for own, plain in against)})
        way.sampler.close()
    return rows


def shares(size: Size, checkpoint: str, directory: Path, ways: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the second table: a short training run each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from appo_lightning.cli import main as appo

    rows = []
    print(
        f"\n{size.name + ', in training':28}{'push, ms':>10}{'checks, ms':>15}{'step, s':>10}{'push':>8}{'checks':>8}"
    )
    for way in ways:
        output = directory / way.replace(" ", "_").replace(",", "")
        arguments = [
            *("fit", "--config", str(ROOT / "configs/quickstart/appo.yaml"), "--output_dir", str(output)),
            *("--model.policy.path", checkpoint, "--export.path", "null", "--trainer.enable_progress_bar", "false"),
            *("--trainer.enable_model_summary", "false"),
            *(
                "--data.prompts_per_mini_batch",
                str(size.prompts),
                "--data.prompts_per_phase",
                str(size.steps_per_phase * size.prompts),
            ),
            *("--trainer.max_steps", str(size.steps), "--checkpoint.every_n_train_steps", str(10 * size.steps)),
        ]
        if way != "all weights":
            arguments += ["--model.policy.lora", json.dumps({"rank": LORA.rank, "alpha": LORA.alpha})]
        if way == "LoRA, adapter":
            arguments += ["--sync.lora", "adapter"]
        assert appo(arguments) == 0
        events = EventAccumulator(str(output)).Reload()
        series = {  # means, because every so many steps one pays for the roots of a phase
            name: statistics.mean([event.value for event in events.Scalars(name)][1:])
            for name in ("sync/push_seconds", "sync/check_seconds", "time/step")
        }
        push, check, step = series.values()
        rows.append({"way": way, "push": push, "check": check, "step": step})
        show_share(rows[-1])
    return rows


def show_pushes(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the first table of a policy."""
    print(f"\n{title:28}{'push, ms':>10}{'read back, ms':>15}{'in a step, ms':>15}{'tokens/s':>10}{'ratio':>7}")
    for row in rows:
        print(
            f"{row['way']:28}{1000 * row['push']:10.1f}{1000 * row['read back']:15.1f}"
            f"{1000 * row['in a step']:15.1f}{row['tokens/s']:10,.0f}{row['ratio']:7.2f}",
            flush=True,
        )


def show_share(row: dict[str, Any]) -> None:
    """Print a row of the second table."""
    print(
        f"{row['way']:28}{1000 * row['push']:10.1f}{1000 * row['check']:15.1f}{row['step']:10.2f}"
        f"{row['push'] / row['step']:8.2%}{row['check'] / row['step']:8.2%}",
        flush=True,
    )


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=[size.name for size in SIZES], default=[s.name for s in SIZES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="rows of the second table")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()

    torch.set_num_threads(1)
    figures: dict[str, Any] = {**machine(), "rounds": options.rounds}
    for size in (size for size in SIZES if size.name in options.sizes):
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = str(Path(directory) / "policy")
            create_tiny_policy(Path(checkpoint), hidden_size=size.hidden, num_layers=size.layers)
            parameters = sum(p.numel() for p in CausalPolicy(PolicyOptions(checkpoint)).parameters())
            title, rows, shared = f"{size.name}, {parameters / 1e6:.1f} M parameters", [], []
            if "pushes" in options.tables:
                rows = pushes(size, checkpoint, options.rounds)
                show_pushes(title, rows)
            if "training" in options.tables:
                shared = shares(size, checkpoint, Path(directory), options.ways)
        figures[size.name] = {"parameters": parameters, "pushes": rows, "training": shared}
    write_figures(options.json, figures)


if __name__ == "__main__":
    sys.exit(main())
