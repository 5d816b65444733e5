"""The quick start's stages work together, with the real engine; `make quickstart` itself takes minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_stage_of_the_quick_start_runs_and_is_reported(tmp_path):
    command = [sys.executable, "tools/quickstart.py", "--smoke", "--folder", str(tmp_path / "quickstart")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((tmp_path / "quickstart" / "quickstart.json").read_text())
    assert [m["label"] for m in summary["measurements"]] == ["untrained", "after SFT", "after APPO"]
    assert all(m["tasks"] == 8 for m in summary["measurements"])
    for text in (
        "success",
        "tool calls / task",
        "tokens / task",
        "seconds",
        "branch after token",
        "tensorboard --logdir",
    ):
        assert text in done.stdout
