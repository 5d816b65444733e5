"""Train the quick start's cold policy under several configs and print held-out success side by side.

    python tools/compare_quickstart.py configs/quickstart/lora.yaml configs/algorithm/grpo.yaml --seeds 0 1

Every config is put over ``configs/quickstart/appo.yaml``; "appo" is that config alone. Needs the cold policy of
``make quickstart``. One seed tells little: see the spread before you believe a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

BASE = "configs/quickstart/appo.yaml"


def appo(log: Path, *arguments: str) -> None:
    """Run an ``appo`` command; its output goes to a log file."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("a") as file:
        code = subprocess.run(
            [sys.executable, "-m", "appo_lightning.cli", *arguments],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code != 0:
        sys.exit(f"appo {' '.join(arguments)}: exit code {code}, see {log}")


def train(overlay: str | None, seed: int, policy: str, folder: Path) -> dict[str, float]:
    """Train and validate one config; its success and seconds."""
    name = Path(overlay).stem if overlay else "appo"
    output = folder / f"{name}_{seed}"
    output.mkdir(parents=True, exist_ok=True)
    log, trained = output / "log.txt", str(output / "policy")
    configs = ["--config", BASE, *(["--config", overlay] if overlay else [])]
    started = time.monotonic()
    appo(
        log,
        *("fit", *configs, "--model.policy.path", policy, "--output_dir", str(output)),
        *("--export.path", trained, "--data.seed", str(seed), "--overwrite", "true"),
    )
    seconds = time.monotonic() - started
    appo(log, "validate", "--config", BASE, "--model.policy.path", trained, "--output_dir", str(output))
    found = json.loads((output / "validation.json").read_text())
    return {"success": found["val/success"], "seconds": seconds, "tasks": found["val/tasks"]}


def main() -> None:
    """Run all configs with all seeds, one after the other, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overlays", nargs="*", help="configs to put over the quick start's")
    parser.add_argument("--policy", default="runs/quickstart/sft_policy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/compare"))
    options = parser.parse_args()
    table = Table("config", *(f"seed {seed}" for seed in options.seeds), "mean", "seconds")
    results = {}
    for overlay in (None, *options.overlays):
        rows = [train(overlay, seed, options.policy, options.folder) for seed in options.seeds]
        name = overlay or BASE
        results[name] = rows
        mean = sum(row["success"] for row in rows) / len(rows)
        seconds = sum(row["seconds"] for row in rows) / len(rows)
        table.add_row(name, *(f"{row['success']:.1%}" for row in rows), f"{mean:.1%}", f"{seconds:.0f}")
        print(f"{name}: {mean:.1%} in {seconds:.0f} s", flush=True)
    Console().print(table)
    (options.folder / "compare.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
