"""A policy from scratch learns JSON function calls from the demonstrations that teach tags to others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from appo_lightning.cli import main
from appo_lightning.tasks.lookup import create_tiny_policy

CONFIGS = Path(__file__).parents[2] / "configs" / "quickstart"


def run(command: str, stage: str, output: Path, **options: Any) -> None:
    configs = [CONFIGS / f"{stage}.yaml", CONFIGS / f"function_calls{'_sft' * (stage == 'sft')}.yaml"]
    words = [word for path in configs for word in ("--config", str(path))]
    options |= {"output_dir": str(output), "trainer.enable_progress_bar": "false"}
    words += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main([command, *words]) == 0


def validated(policy: str, output: Path) -> dict[str, float]:
    run(
        "validate",
        "appo",
        output,
        **{
            "model.policy.path": policy,
            "data.sampler": "TransformersSampler",
            "data.tools": '[{"class_path": "SearchTool", "init_args": {"top_k": 1}}]',
            "data.validation.init_args.size": 32,
            "data.validation.init_args.hops": "[1]",
        },
    )
    return json.loads((output / "validation.json").read_text())


@pytest.mark.slow
def test_demonstrations_teach_function_calls(tmp_path: Path) -> None:
    untrained = str(create_tiny_policy(tmp_path / "tiny", hidden_size=64, function_calls=True))
    before = validated(untrained, tmp_path / "before")
    assert before["val/reward_format"] == 0
    assert before["val/tool_calls"] < 0.2
    learned = tmp_path / "learned"
    run(
        "fit",
        "sft",
        tmp_path / "sft",
        **{
            "model.policy.path": untrained,
            "export.path": str(learned),
            "data.tools": '[{"class_path": "SearchTool"}]',
            "data.source.init_args.hops": "[1]",
            "data.source.init_args.error_rate": 0,
            "data.source.init_args.fillers": "[0, 0]",
            "data.batch_size": 16,
            "data.steps": 100,
        },
    )
    after = validated(str(learned), tmp_path / "after")
    # A call for every task, and for most of them read, answered and followed by an answer. To ask for the right thing
    # takes longer.
    assert after["val/tool_calls"] > 0.9
    assert after["val/reward_format"] > 0.4
