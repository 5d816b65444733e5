"""The published data formats, end to end with the tiny policy: no success expected, every part at work."""

import json
from pathlib import Path

import pytest

from appo_lightning.cli import main
from appo_lightning.tasks.lookup import create_tiny_policy

CONFIG = str(Path(__file__).parents[2] / "configs" / "data" / "arpo.yaml")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(create_tiny_policy(tmp_path_factory.mktemp("tiny") / "policy"))


@pytest.fixture
def arguments(tiny, sample_data, tmp_path) -> list[str]:
    return [
        *("--config", CONFIG, "--model.policy.path", tiny, "--output_dir", str(tmp_path / "run")),
        *("--data.train.init_args.path", str(sample_data / "rl" / "train_10k.parquet")),
        *("--data.validation.init_args.path", str(sample_data / "rl" / "valid.parquet")),
        *("--data.tools.init_args.corpus", str(sample_data / "search" / "search_cache.json")),
        *("--data.validation.init_args.limit", "2", "--data.sampler", "TransformersSampler"),
        *("--data.rollout.max_response_tokens", "64", "--trainer.enable_progress_bar", "false"),
    ]


@pytest.mark.slow
def test_published_rows_train_for_two_steps_and_validate(arguments, tmp_path, caplog):
    assert main(["fit", *arguments]) == 0
    notices = [record.getMessage() for record in caplog.records if "backslash" in record.getMessage()]
    assert len(notices) == 2, "one notice for each of the two files"
    sample = (tmp_path / "run" / "rollout_sample.txt").read_text()
    assert sample.startswith("step 1\ntask train_10k-")
    assert "\x08" not in sample
    assert main(["validate", *arguments]) == 0
    report = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert report["val/tasks"] == 2
    # An untrained policy does not keep the format: the published rule says -1.
    assert report["val/reward"] == -1.0
    assert report["val/reward_format"] == 0.0


def test_missing_data_file_is_one_line(arguments, capsys):
    assert main(["fit", *arguments, "--data.train.init_args.path", "no/such.parquet"]) == 1
    text = capsys.readouterr().err
    assert "no/such.parquet" in text
    assert "Traceback" not in text


def test_file_without_a_usable_row_is_refused(arguments, capsys, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text(json.dumps({"prompt": [], "reward_model": {"ground_truth": ""}}) + "\n")
    assert main(["fit", *arguments, "--data.train.init_args.path", str(path)]) == 1
    assert "empty.jsonl" in capsys.readouterr().err
