"""Draw the quick start's learning curve, and write its result into the documents.

    python tools/figures.py             # docs/images/quickstart.png; needs matplotlib
    python tools/figures.py --readme    # the marked blocks of README.md and docs/quickstart.md

Both read what ``make quickstart`` left in ``runs/quickstart``; no number is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "quickstart.md")
PICTURE = ROOT / "docs" / "images" / "quickstart.png"
WINDOW = 5  # steps of the moving average


def result_table(summary: dict[str, Any]) -> str:
    """The final table of the quick start as plain text."""
    measurements, seconds = summary["measurements"], summary["seconds"]
    lines = [f"{'policy':<14}{'success':>9}{'tool calls / task':>20}{'tokens / task':>16}"]
    lines += [f"{m['label']:<14}{m['success']:>9.1%}{m['tool_calls']:>20.2f}{m['tokens']:>16.1f}" for m in measurements]
    lines += [f"on {measurements[0]['tasks']} held-out tasks, one rollout each", ""]
    lines += [f"{'stage':<24}{'seconds':>9}"]
    lines += [f"{name:<24}{value:>9.0f}" for name, value in seconds.items()]
    lines += [f"{'all':<24}{sum(seconds.values()):>9.0f}"]
    return "\n".join(lines)


def replace_block(text: str, name: str, body: str) -> str:
    """The document with ``body`` between ``<!-- name -->`` and ``<!-- /name -->``; without the markers, unchanged."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    # A function: the body may hold backslashes.
    return pattern.sub(lambda match: f"{match[1]}```text\n{body}\n```\n{match[2]}", text)


def write_documents(folder: Path, documents: tuple[Path, ...] = DOCUMENTS) -> None:
    """Put the table and a sample rollout into the documents."""
    table = result_table(json.loads((folder / "quickstart.json").read_text()))
    sample = (folder / "appo" / "rollout_sample.txt").read_text().strip()
    for document in documents:
        text = document.read_text()
        text = replace_block(text, "quickstart-table", table)
        document.write_text(replace_block(text, "quickstart-sample", sample))


def read_scalar(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a TensorBoard scalar."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    scalars = events.Scalars(name)
    return [scalar.step for scalar in scalars], [scalar.value for scalar in scalars]


def moving_average(values: list[float], window: int = WINDOW) -> list[float]:
    """Mean of the last ``window`` values at each place; of fewer at the beginning."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i + 1 - window) : i + 1])]


def draw_learning_curve(folder: Path, path: Path) -> None:
    """Success of the training rollouts by step, and of the held-out tasks before and after."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    steps, success = read_scalar(folder / "appo", "rollout/success")
    before, after = json.loads((folder / "quickstart.json").read_text())["measurements"][-2:]
    figure, axes = plt.subplots(figsize=(7.2, 3.6), dpi=160)
    axes.plot(steps, success, ".", color="#93c5fd", label="training rollouts of a step")
    axes.plot(steps, moving_average(success), color="#2563eb", linewidth=2, label=f"mean of the last {WINDOW} steps")
    axes.plot(
        [0, steps[-1]],
        [before["success"], after["success"]],
        "D",
        color="#15803d",
        markersize=8,
        clip_on=False,
        zorder=3,
        label=f"{after['tasks']} held-out tasks: {before['success']:.1%} before, {after['success']:.1%} after",
    )
    axes.set(xlabel="optimiser step", ylabel="success", ylim=(0, 1.05), xlim=(0, steps[-1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e2e8f0")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without a date or version inside, the same run draws the same bytes.
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Parse arguments, then draw or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "quickstart", help="of the quick start")
    parser.add_argument("--readme", action="store_true", help="write the documents' blocks instead of the picture")
    options = parser.parse_args()
    if not (options.folder / "quickstart.json").is_file():
        parser.error(f"expected {options.folder}/quickstart.json, found none: run make quickstart first")
    if options.readme:
        write_documents(options.folder)
        return
    try:
        draw_learning_curve(options.folder, PICTURE)
    except ModuleNotFoundError as error:
        parser.error(f"the picture needs {error.name}: .venv/bin/pip install {error.name}")


if __name__ == "__main__":
    main()
