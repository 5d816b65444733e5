"""The quick start: make a tiny policy, teach it the format, train it with APPO, and show what changed.

Every stage is an ``appo`` command that is printed before it runs, so each can be repeated by hand. Run by
``make quickstart``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

APPO_CONFIG = "configs/quickstart/appo.yaml"
SFT_CONFIG = "configs/quickstart/sft.yaml"
# Every stage in seconds instead of minutes: shows that they work together, teaches nothing.
SMOKE = {
    "sft": ("--data.steps", "32", "--data.batch_size", "4"),
    "appo": ("--trainer.max_steps", "1", "--data.prompts_per_phase", "4", "--data.prompts_per_mini_batch", "4"),
    "validate": ("--data.validation.init_args.size", "8"),
}


@dataclass
class Measurement:
    """What ``appo validate`` found for one policy."""

    label: str
    success: float
    tool_calls: float
    tokens: float
    tasks: int


class QuickStart:
    """Runs the stages in order and remembers their seconds.

    Args:
        folder: everything is written below it.
        extra: further arguments of the reinforcement-learning stage, such as a second ``--config``.
        smoke: run every stage for a moment only.
        console: where the report goes.
    """

    def __init__(self, folder: Path, extra: list[str], *, smoke: bool, console: Console) -> None:
        self._folder, self._extra, self._console = folder, extra, console
        self._short = SMOKE if smoke else {"sft": (), "appo": (), "validate": ()}
        self.seconds: dict[str, float] = {}
        self.measurements: list[Measurement] = []

    def run(self) -> None:
        """All stages."""
        tiny, cold, trained = (self._folder / name for name in ("tiny", "sft_policy", "appo_policy"))
        self._stage("make a policy", "create-tiny", "--output", str(tiny))
        self._validate("untrained", tiny)
        self._stage(
            "SFT cold start",
            *("fit", "--config", SFT_CONFIG),
            *("--model.policy.path", str(tiny), "--output_dir", str(self._folder / "sft"), "--export.path", str(cold)),
            *self._short["sft"],
        )
        self._validate("after SFT", cold)
        self._stage(
            "APPO",
            *("fit", "--config", APPO_CONFIG, *self._extra),
            *("--model.policy.path", str(cold), "--output_dir", str(self._folder / "appo")),
            *("--export.path", str(trained), *self._short["appo"]),
        )
        self._validate("after APPO", trained)

    def _validate(self, label: str, policy: Path) -> None:
        output = self._folder / label.replace(" ", "_")
        self._stage(
            f"validate, {label}",
            *("validate", "--config", APPO_CONFIG, "--model.policy.path", str(policy), "--output_dir", str(output)),
            *self._short["validate"],
        )
        found = json.loads((output / "validation.json").read_text())
        self.measurements.append(
            Measurement(
                label,
                success=found["val/success"],
                tool_calls=found["val/tool_calls"],
                tokens=found["val/response_tokens"],
                tasks=round(found["val/tasks"]),
            )
        )

    def _stage(self, name: str, *arguments: str) -> None:
        self._console.rule(f"[bold]{name}", align="left")
        self._console.print(f"appo {' '.join(arguments)}", style="dim", highlight=False, soft_wrap=True)
        started = time.monotonic()
        # A model this small gains nothing from a second thread, and loses much when the machine has other work.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        command = [sys.executable, "-m", "appo_lightning.cli", *arguments]
        code = subprocess.run(command, env=environment, check=False).returncode
        if code != 0:
            self._console.print(f"stage '{name}' ended with exit code {code}", style="red")
            sys.exit(code)
        self.seconds[name] = time.monotonic() - started

    def report(self) -> None:
        """The table, a sample rollout with its branches, and where to look next."""
        console, folder = self._console, self._folder
        console.rule("[bold]result", align="left")
        table = Table("policy", "success", "tool calls / task", "tokens / task")
        for m in self.measurements:
            table.add_row(m.label, f"{m.success:.1%}", f"{m.tool_calls:.2f}", f"{m.tokens:.1f}")
        console.print(table)
        console.print(f"on {self.measurements[0].tasks} held-out tasks, one rollout each", style="dim")
        times = Table("stage", "seconds")
        for name, seconds in self.seconds.items():
            times.add_row(name, f"{seconds:.0f}")
        times.add_section()
        times.add_row("all", f"{sum(self.seconds.values()):.0f}")
        console.print(times)
        sample = folder / "appo" / "rollout_sample.txt"
        if sample.exists():
            console.rule("[bold]one task of the last step with its branches", align="left")
            console.print(sample.read_text(), highlight=False, markup=False, soft_wrap=True)
        console.rule(align="left")
        console.print(f"TensorBoard files: {folder}/appo", highlight=False)
        console.print(f"to look at them:   .venv/bin/tensorboard --logdir {folder}", highlight=False)
        console.print(f"trained policy:    {folder}/appo_policy (an ordinary transformers checkpoint)", highlight=False)
        summary = {"measurements": [vars(m) for m in self.measurements], "seconds": self.seconds}
        (folder / "quickstart.json").write_text(json.dumps(summary, indent=1) + "\n")


def main() -> None:
    """Parse arguments and run; unknown arguments go to the reinforcement-learning stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--smoke", action="store_true", help="every stage for a moment only")
    options, extra = parser.parse_known_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    quick_start = QuickStart(options.folder, extra, smoke=options.smoke, console=Console())
    quick_start.run()
    quick_start.report()


if __name__ == "__main__":
    main()
