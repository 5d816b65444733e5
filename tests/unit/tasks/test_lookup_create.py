import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from appo_lightning.errors import ConfigurationError
from appo_lightning.tasks.lookup.create import create_tiny_policy, main
from appo_lightning.tasks.lookup.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return create_tiny_policy(tmp_path_factory.mktemp("tiny"), seed=5)


def test_the_checkpoint_loads_as_any_other(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert 300_000 < sum(parameter.numel() for parameter in model.parameters()) < 3_000_000
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    text = "What is the age of Bako?\n żółw <think>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert "assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )


def test_the_same_seed_writes_the_same_weights(checkpoint, tmp_path):
    again, other = create_tiny_policy(tmp_path / "again", seed=5), create_tiny_policy(tmp_path / "other", seed=6)
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == weights
    assert (other / "model.safetensors").read_bytes() != weights


def test_the_global_random_state_is_left_alone(tmp_path):
    before = torch.get_rng_state()
    create_tiny_policy(tmp_path / "policy", hidden_size=32, num_layers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_command_writes_a_checkpoint(tmp_path, capsys):
    main(["--output", str(tmp_path / "new" / "policy"), "--hidden-size", "64", "--num-layers", "1"])
    assert (tmp_path / "new" / "policy" / "generation_config.json").is_file()
    assert "Wrote an untrained policy" in capsys.readouterr().out


def test_the_command_names_the_configs_of_function_calls(tmp_path, capsys):
    main(["--output", str(tmp_path / "policy"), "--hidden-size", "32", "--num-layers", "1", "--function-calls"])
    assert capsys.readouterr().out.endswith("--config configs/quickstart/function_calls_sft.yaml\n")
    assert "<tool_call>" in AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template


def test_foreign_directories_are_not_written_into(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is no checkpoint"):
        create_tiny_policy(tmp_path)


@pytest.mark.parametrize("size", [{"hidden_size": 48}, {"hidden_size": 0}, {"num_layers": 0}])
def test_impossible_sizes_are_refused(tmp_path, size):
    with pytest.raises(ConfigurationError):
        create_tiny_policy(tmp_path / "policy", **size)
