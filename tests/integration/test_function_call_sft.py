"""A policy from scratch learns JSON function calls from the demonstrations that teach tags to others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from appo_lightning.cli import main
from appo_lightning.tasks.lookup import create_tiny_policy
from helpers.chat_templates import QWEN25

CONFIGS = Path(__file__).parents[2] / "configs"
# The tools in a few tokens: a policy of this size should not read a page of JSON before each question.
_SHORT_TOOLS = "{{- '\\n' + tool.function.name + tool.function.description }}"
TEMPLATE = QWEN25.replace("{{- '\\n' + (tool | tojson) }}", _SHORT_TOOLS)
TOKENS = (
    '\n<tool_call>\n{"name": "search", "arguments": {"query": "',
    '"}}\n</tool_call>',
    "\n<|im_start|>user\n<tool_response>\n",
    "\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "search" + "Finds documents that answer a query.",
    '\n</tools>\nReturn calls as <tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>',
    "# Tools\n<tools>",
)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(create_tiny_policy(tmp_path_factory.mktemp("policy"), hidden_size=64, num_layers=2))
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in TOKENS])
    tokenizer.chat_template = TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(command: str, stage: str, output: Path, **options: Any) -> None:
    configs = [CONFIGS / "quickstart" / f"{stage}.yaml", CONFIGS / "data" / f"hermes{'_sft' * (stage == 'sft')}.yaml"]
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
            "data.rollout.max_prompt_tokens": 100,
        },
    )
    return json.loads((output / "validation.json").read_text())


@pytest.mark.slow
def test_demonstrations_teach_function_calls(untrained: str, tmp_path: Path) -> None:
    before = validated(untrained, tmp_path / "before")
    assert before["val/tool_calls"] < 0.2
    assert before["val/success"] == 0
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
            "data.batch_size": 32,
            "data.steps": 120,
        },
    )
    after = validated(str(learned), tmp_path / "after")
    # Every task with a call that was read and answered; most of them ask the right thing and copy the answer.
    assert after["val/tool_calls"] > 0.9
    assert after["val/success"] > 0.3
