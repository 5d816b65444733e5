"""The command line as a user meets it: what it answers, what it writes, how it fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from appo_lightning.cli import main
from appo_lightning.tasks.lookup import create_tiny_policy

CONFIG = str(Path(__file__).parents[2] / "configs" / "quickstart" / "appo.yaml")
LORA = str(Path(__file__).parents[2] / "configs" / "quickstart" / "lora.yaml")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return create_tiny_policy(tmp_path_factory.mktemp("tiny") / "policy")


@pytest.fixture
def arguments(tiny, tmp_path) -> list[str]:
    """A run of seconds: two mini-batches of two prompts."""
    return [
        *("--config", CONFIG, "--model.policy.path", str(tiny), "--output_dir", str(tmp_path / "run")),
        *("--data.sampler", "TransformersSampler", "--data.validation.init_args.size", "4"),
        *("--data.prompts_per_phase", "4", "--data.prompts_per_mini_batch", "2", "--trainer.max_steps", "2"),
        *("--data.rollout.max_response_tokens", "48", "--trainer.enable_progress_bar", "false"),
        *("--export.path", str(tmp_path / "exported"), "--checkpoint.every_n_train_steps", "1"),
    ]


def _fails(capsys, *command: str) -> tuple[int, str]:
    """Exit code and error text of a command that must not end well, without a traceback."""
    try:
        code = main(command)
    except SystemExit as error:
        code = int(error.code or 0)
    text = capsys.readouterr().err
    assert code != 0
    assert "Traceback" not in text
    return code, text


def test_fit_trains_logs_checkpoints_and_exports(arguments, tmp_path):
    assert main(["fit", *arguments]) == 0
    run = tmp_path / "run"
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert (run / "config.yaml").exists()
    assert "task lookup" in (run / "rollout_sample.txt").read_text() or (run / "rollout_sample.txt").read_text()
    events = EventAccumulator(str(run))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    for name in ("rollout/reward", "branch/count", "credit/advantage", "loss/policy", "sync/canary_gap", "time/score"):
        assert name in scalars
        assert [event.step for event in events.Scalars(name)] == [1, 2]
    assert "rollout/sample/text_summary" in events.Tags()["tensors"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    weight = exported.state_dict()["model.norm.weight"]
    assert torch.equal(weight, state["policy.model.model.norm.weight"])


def test_lora_trains_adapters_alone_and_exports_for_peft(arguments, tmp_path, tiny):
    from peft import PeftModel

    assert main(["fit", "--config", CONFIG, "--config", LORA, *arguments[2:]]) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    names = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert names
    assert all(".lora_" in name for name in names)
    config = str(tmp_path / "run" / "config.yaml")
    output = tmp_path / "adapters"
    command = ["export", "--config", config, "--ckpt_path", str(checkpoint), "--output", str(output), "--adapters"]
    assert main(command) == 0
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), output).merge_and_unload()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, exported(ids).logits, atol=1e-5, rtol=0)


def test_validate_writes_its_report(arguments, tmp_path):
    assert main(["validate", *arguments]) == 0
    report = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert report["val/tasks"] == 4
    assert 0 <= report["val/success"] <= 1
    assert "reward" in (tmp_path / "run" / "validation_rollouts.txt").read_text()


def test_test_reports_under_its_own_names(arguments, tmp_path):
    assert main(["test", *arguments]) == 0
    assert "test/success" in json.loads((tmp_path / "run" / "test.json").read_text())


def test_predict_writes_every_rollout_as_json(arguments, tmp_path):
    assert main(["predict", *arguments, "--predictions.path", str(tmp_path / "rollouts.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    root = lines[0]["roots"][0]
    assert len(root["response_ids"]) == len(root["sampled"]) == len(root["behaviour_logprobs"])


def test_second_fit_does_not_overwrite_the_first_unasked(arguments, capsys):
    assert main(["fit", *arguments]) == 0
    code, text = _fails(capsys, "fit", *arguments)
    assert code == 1
    assert "--ckpt_path last" in text
    assert main(["fit", *arguments, "--overwrite", "true"]) == 0


def test_finished_run_goes_on_from_its_last_checkpoint(arguments, tmp_path):
    assert main(["fit", *arguments]) == 0
    assert main(["fit", *arguments, "--trainer.max_steps", "3", "--ckpt_path", "last"]) == 0
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--model.optimizer.learning_rat", "1"], "did you mean: model.optimizer.learning_rate"),
        (["--data.branching.num_roots", "eight"], "data.branching.num_roots"),
        (["--data.branching.num_rollouts", "2"], "M = 2 < N = 4"),
        (["--data.rollout.temperature", "0"], "temperature"),
        (["--data.prompts_per_mini_batch", "3"], "multiple"),
        (["--model.policy.path", "no/such/policy"], "policy.path"),
        (["--ckpt_path", "last"], "last.ckpt"),
        (["--ckpt_path", "missing.ckpt"], "missing.ckpt"),
        (["--trainer.precision", "bf16-true"], "bf16-mixed"),
        (["--data.rollout.max_prompt_tokens", "3"], "the budget is 3"),
        (["--data.rollout.max_response_tokens", "100000"], "positions"),
        (["--stage", "nonsense"], "stage must be"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--model.loss.kl", "k3"], "kl_coefficient"),
        (["--data.train.init_args.size", "2"], "prompts_per_phase"),
    ],
)
def test_mistake_is_one_clear_line(arguments, capsys, extra, expected):
    _, text = _fails(capsys, "fit", *arguments, *extra)
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert expected in text


def test_missing_chat_template_is_named(arguments, capsys, tiny, tmp_path):
    import shutil

    plain = tmp_path / "no_template"
    shutil.copytree(tiny, plain)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    _, text = _fails(capsys, "fit", *arguments, "--model.policy.path", str(plain))
    assert "has no chat template" in text


def test_branches_without_logprobs_are_refused(arguments, capsys, monkeypatch):
    from appo_lightning.samplers.transformers import TransformersSampler

    monkeypatch.setattr(TransformersSampler, "provides_logprobs", False)
    _, text = _fails(capsys, "fit", *arguments)
    assert "gives no log-probs" in text


def test_traceback_on_request(arguments, monkeypatch):
    monkeypatch.setenv("APPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="multiple"):
        main(["fit", *arguments, "--data.prompts_per_mini_batch", "3"])


def test_unknown_command_names_the_known_ones(capsys):
    _, text = _fails(capsys, "fitt")
    assert "fit, validate, test, predict, export, create-tiny" in text


def test_help_lists_every_group(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", CONFIG, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key in (
        *("--model.policy.path", "--model.optimizer.learning_rate", "--model.loss.clip_low", "--data.sampler"),
        *("--data.branching.criterion", "--data.rollout.max_response_tokens", "--advantage.scaling"),
        *("--sync.canary_prompts", "--checkpoint.every_n_train_steps", "--export.path", "--output_dir"),
    ):
        assert key in text
    assert "VLLMSampler" in text
    assert "TransformersSampler" in text


@pytest.mark.engine
@pytest.mark.slow
def test_fit_and_validate_with_the_real_engine(arguments, tmp_path):
    """In processes of their own: the engine is for life."""
    own = [*arguments, "--data.sampler", "VLLMSampler"]
    for command in ("fit", "validate"):
        done = subprocess.run(
            [sys.executable, "-m", "appo_lightning.cli", command, *own], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "validation.json").read_text())["val/tasks"] == 4
