"""A training run from a recording that is kept with the code: its tools are neither there nor needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from appo_lightning.cli import main
from appo_lightning.errors import ToolBroken
from appo_lightning.tools.python import PythonTool
from appo_lightning.tools.search import SearchTool
from appo_lightning.tools.web import WebSearchTool
from helpers import recorded_run, training
from helpers.training import Result

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart" / "appo.yaml"


def unavailable(*_: Any) -> None:
    raise AssertionError("a replay must not touch the tool")


def replayed(folder: Path, **options: Any) -> Result:
    try:
        return recorded_run.train(folder, replay=recorded_run.CALLS, **options)
    except ToolBroken as error:
        pytest.fail(f"{error} ({recorded_run.RECORD_AGAIN})")


def test_a_run_with_web_search_trains_from_its_recording(tmp_path, monkeypatch):
    for tool in (WebSearchTool, PythonTool):
        monkeypatch.setattr(tool, "open", unavailable)
    before = recorded_run.CALLS.read_bytes()
    result = replayed(tmp_path)
    expected = json.loads(recorded_run.EXPECTED.read_text())

    rollouts = recorded_run.exact_facts(result)
    assert len(rollouts) == len(expected["rollouts"])
    for found, kept in zip(rollouts, expected["rollouts"], strict=True):
        assert found == kept, f"another rollout than the recorded one: {recorded_run.RECORD_AGAIN}"
    # Both tools answered, some calls failed, and one needed what an earlier one had left in the interpreter.
    calls = [tuple(call) for rollout in rollouts for call in rollout["calls"]]
    assert len(calls) > 50
    assert {(name, error) for name, _, _, error in calls} >= {("search", None), ("python", None), ("python", "error")}
    assert ("python", "x + 1", "8", None) in calls
    assert {*result.series("tools/search_cache_hit_rate"), *result.series("tools/python_cache_hit_rate")} == {1.0}

    for name, values in recorded_run.near_facts(result).items():
        # Ten times what weights that are off by 1e-6 lead to (tools/record_run.py prints it).
        assert values == pytest.approx(expected["numbers"][name], rel=1e-5, abs=1e-3), name
    assert recorded_run.CALLS.read_bytes() == before


def test_one_flag_records_a_run_and_one_replays_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "TAG_LEAN", 0.5)
    policy = training.make_checkpoint(tmp_path / "policy", hidden_size=32, num_layers=1)
    overlay = tmp_path / "overlay.yaml"
    sampler = {"class_path": "TransformersSampler", "init_args": {"max_batch_size": 1}}
    overlay.write_text(json.dumps({"data": {"sampler": sampler}}))
    options = {
        "model.policy.path": policy,
        "export.path": str(tmp_path / "exported"),
        "trainer.max_steps": "1",
        "trainer.limit_val_batches": "0",
        "data.prompts_per_phase": "4",
        "data.prompts_per_mini_batch": "4",
        "trainer.enable_progress_bar": "false",
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    calls = tmp_path / "calls.jsonl"

    def fit(output: str, *more: str) -> int:
        configs = ["--config", str(QUICKSTART), "--config", str(overlay)]
        return main(["fit", *configs, *arguments, "--output_dir", str(tmp_path / output), *more])

    assert fit("recorded", "--data.record_tools", str(calls)) == 0
    assert {json.loads(line)["key"] for line in calls.read_text().splitlines()} > {"tool/search", "tool/python"}
    for tool in (SearchTool, PythonTool):
        monkeypatch.setattr(tool, "open", unavailable)
    assert fit("replayed", "--data.replay_tools", str(calls)) == 0
    assert metrics(tmp_path / "replayed") == metrics(tmp_path / "recorded")

    assert fit("another", "--data.replay_tools", str(calls), "--data.seed", "1") == 1
    assert "holds no answer of" in capsys.readouterr().err


def metrics(output: Path) -> dict[str, list[float]]:
    """What was logged, but for what depends on the clock or on the record itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(output.rglob("events.*")).parent))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith(("loss/", "reward/", "rollout/", "branch/"))]
    assert len(names) > 20
    return {name: [event.value for event in events.Scalars(name)] for name in names}
