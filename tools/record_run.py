"""Record the tools of a short training run, for the test that repeats it without them.

    python tools/record_run.py

trains with a web search (against a local service that answers otherwise each time) and a Python interpreter, and writes
``tests/data/recorded_run``: the calls with their answers, and what the run came to. Then it repeats the run with
weights that are off by a little, more than processors differ by: a run that takes another turn then would be no use
elsewhere.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import recorded_run  # noqa: E402
from helpers.search_service import serving  # noqa: E402

NOISE = 1e-6  # relative; rounding to float32 is 6e-8, and adds up over a forward pass
REPEATS = 4


def main() -> None:
    """Record, write, try."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        recorded_run.CALLS.parent.mkdir(parents=True, exist_ok=True)
        recorded_run.CALLS.unlink(missing_ok=True)
        with serving(recorded_run.PORT) as service:
            result = recorded_run.train(folder, record=recorded_run.CALLS)
        exact, near = recorded_run.exact_facts(result), recorded_run.near_facts(result)
        lines = recorded_run.CALLS.read_text().splitlines(keepends=True)
        # By task and tool, not by the timing of calls: what changes then shows.
        lines.sort(key=lambda line: (json.loads(line)["query"], line))
        recorded_run.CALLS.write_text("".join(lines))
        write_expected(exact, near)
        calls = Counter(f"{name} {error or 'answered'}" for rollout in exact for name, _, _, error in rollout["calls"])
        print(f"{len(exact)} rollouts, {len(service.requests)} requests, {len(lines)} lines; calls: {dict(calls)}")
        torch.manual_seed(0)
        for number in range(REPEATS):
            again = recorded_run.train(folder, replay=recorded_run.CALLS, noise=NOISE)
            if recorded_run.exact_facts(again) != exact:
                sys.exit("a little noise leads to another run: change the seed in tests/helpers/recorded_run.py")
            off = {
                name: max(abs(a - b) for a, b in zip(values, near[name], strict=True))
                for name, values in recorded_run.near_facts(again).items()
            }
            print(f"repeat {number + 1}: the same tokens and calls; off by at most", off)


def write_expected(exact: list[dict], near: dict[str, list[float]]) -> None:
    """One line for each rollout and each series of numbers."""
    rollouts = ",\n  ".join(map(json.dumps, exact))
    numbers = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in near.items())
    text = f'{{\n"rollouts": [\n  {rollouts}\n],\n"numbers": {{\n  {numbers}\n}}\n}}\n'
    recorded_run.EXPECTED.write_text(text)


if __name__ == "__main__":
    main()
