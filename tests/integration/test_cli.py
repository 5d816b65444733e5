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
        (["--model.policy.lora.rank", "0"], "policy.lora.rank must be at least 1"),
        (["--model.policy.lora", "{alpha: .nan}"], "policy.lora.alpha must be a positive number"),
        (["--model.optimizer.learning_rate", ".inf"], "optimizer.learning_rate must be a positive number"),
        (["--model.optimizer.weight_decay", "-1"], "optimizer.weight_decay"),
        (["--model.optimizer.betas", "[0.9, 1]"], "optimizer.betas"),
        (["--model.optimizer.warmup_steps", "-1"], "optimizer.warmup_steps"),
        (["--model.loss.clip_high", "-1"], "model.loss.clip_high"),
        (["--model.loss.kl", "k3", "--model.loss.kl_coefficient", "-1"], "model.loss.kl_coefficient"),
        (["--advantage.safety_threshold", "0"], "advantage.safety_threshold"),
        (["--sync.tolerance", "0"], "sync.tolerance"),
        (["--data.rollout.temperature", ".inf"], "rollout.temperature"),
        (["--data.validation_temperature", "-1"], "rollout.temperature"),
        (["--data.branching.min_remaining", "48"], "leaves no place to branch"),
        (["--data.branching.weights", "[1, 2]"], "has no effect with criterion: branching_score"),
        (["--data.tools", "[{class_path: SearchTool}, {class_path: SearchTool}]"], "names of tools must differ"),
        (["--data.tools", "[{class_path: PythonTool, init_args: {preload: [absent]}}]"], "cannot import 'absent'"),
        (["--data.sampler.init_args.device", "tpu"], "device must be"),
        (["--seed_everything", "-1"], "seed_everything"),
        (["--checkpoint.save_top_k", "-5"], "save_top_k"),
        (["--trainer.strategy", "nonsense"], "strategy"),
        (["--trainer.devices", "0"], "devices"),
        (["--trainer.gradient_clip_val", "1"], "gradient_clip_val"),
        (["--trainer.val_check_interval", "0"], "val_check_interval must be positive"),
        (["--trainer.val_check_interval", "100000000"], "val_check_interval"),
        (["--trainer.default_root_dir", "elsewhere"], "set output_dir"),
        (["--output_dir", ""], "output_dir is empty"),
        (["--output_dir", "/proc/nowhere"], "/proc/nowhere"),
        (["--export.path", "/proc/nowhere"], "/proc/nowhere"),
        (["--export.path", CONFIG], "appo.yaml: File exists"),
        (["--export.merge", "false"], "export.merge"),
        (["--ckpt_path", CONFIG], "is no checkpoint"),
    ],
)
def test_mistake_is_one_clear_line(arguments, capsys, extra, expected):
    _, text = _fails(capsys, "fit", *arguments, *extra)
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert expected in text


@pytest.mark.parametrize(
    ("command", "extra", "expected"),
    [
        ("validate", ["--ckpt_path", "missing.ckpt"], "missing.ckpt"),
        ("test", ["--ckpt_path", "last"], "last.ckpt"),
        ("predict", ["--predictions.path", "/proc/nowhere/rollouts.jsonl"], "/proc/nowhere"),
    ],
)
def test_mistake_in_an_evaluation_is_one_clear_line(arguments, capsys, command, extra, expected):
    _, text = _fails(capsys, command, *arguments, *extra)
    assert [expected in line for line in text.splitlines() if line.startswith("error:")] == [True]


def test_config_of_a_run_with_another_output_dir_leaves_that_run_alone(arguments, tmp_path):
    assert main(["fit", *arguments]) == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    written = last.stat().st_mtime_ns
    again = ["fit", "--config", str(tmp_path / "run" / "config.yaml"), "--output_dir", str(tmp_path / "other")]
    assert main([*again, "--overwrite", "true"]) == 0
    assert (tmp_path / "other" / "checkpoints" / "last.ckpt").exists()
    assert last.stat().st_mtime_ns == written


def test_validation_inside_a_fit_is_logged_at_its_step(arguments, tmp_path):
    assert main(["fit", *arguments, "--trainer.val_check_interval", "1"]) == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for name in ("val/success", "val_tools/calls_per_trajectory"):
        assert [event.step for event in events.Scalars(name)] == [1, 2], name


def test_bfloat16_autocast_of_the_trainer_passes_the_canary(arguments):
    assert main(["fit", *arguments, "--trainer.precision", "bf16-mixed"]) == 0


def test_a_trial_of_one_batch_exports_no_policy(arguments, tmp_path):
    assert main(["fit", *arguments, "--trainer.fast_dev_run", "true"]) == 0
    assert not (tmp_path / "exported" / "config.json").exists()


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
