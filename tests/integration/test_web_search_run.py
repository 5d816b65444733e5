"""A training run with web search: the key is in nothing that it leaves behind."""

import json
from pathlib import Path

from appo_lightning.cli import main
from helpers import training
from helpers.search_service import serving

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart" / "appo.yaml"
KEY = "sk-test-4711-do-not-tell"


def test_a_run_searches_and_leaves_no_key_behind(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TEST_SEARCH_KEY", KEY)
    monkeypatch.setattr(training, "TAG_LEAN", 0.5)
    policy = training.make_checkpoint(tmp_path / "policy", hidden_size=32, num_layers=1)
    output = tmp_path / "run"
    with serving() as service:
        provider = {
            "url": service.url,
            "params": {"q": "{query}", "k": "{key}"},
            "headers": {"X-Key": "{key}"},
            "key": "TEST_SEARCH_KEY",
            "results": "web.results",
            "text": "snippet",
        }
        tool = {"class_path": "WebSearchTool", "init_args": {"provider": provider, "cache": str(output / "web.sqlite")}}
        overlay = tmp_path / "web.yaml"
        overlay.write_text(json.dumps({"data": {"tools": [tool], "sampler": {"class_path": "TransformersSampler"}}}))
        options = {
            "model.policy.path": policy,
            "output_dir": str(output),
            "export.path": str(output / "exported"),
            "trainer.max_steps": "1",
            "checkpoint.every_n_train_steps": "1",
            "data.prompts_per_phase": "8",
            "data.prompts_per_mini_batch": "8",
            "trainer.enable_progress_bar": "false",
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        assert main(["fit", "--config", str(QUICKSTART), "--config", str(overlay), *arguments]) == 0
    assert any(request["key"] == KEY for request in service.requests)
    files = [path for path in output.rglob("*") if path.is_file()]
    assert {"config.yaml", "web.sqlite", "last.ckpt"} <= {path.name for path in files}
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in "".join(capfd.readouterr())
