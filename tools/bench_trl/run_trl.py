"""TRL's side of the benchmark, run by the Python of its own environment: run_trl.py CASE FOLDER STEPS [--pool]."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from shared import TOOL, SlowTool, Turns, even_words
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl_pool import PooledTools

HERE = Path(__file__).parent


class StepClock(TrainerCallback):
    """Takes turns with the other contestants: a step is everything from one optimiser step to the next."""

    def __init__(self, counts: Callable[[dict[str, float]], dict[str, Any]]) -> None:
        self._turns, self._counts = Turns(), counts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        names = ("trl", "torch", "transformers", "accelerate")
        facts = {"versions": {name: importlib.metadata.version(name) for name in names}}
        control.should_training_stop = not self._turns.ready(facts)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # With logging_steps = 1 the last thing of a step.
        if logs is None or "completions/mean_length" not in logs:
            return
        control.should_training_stop = not self._turns.step_done(lambda: self._counts(logs))


class Seen:
    """What the reward function is shown of a step, kept until the clock has stopped."""

    def __init__(self, tokenizer: Any, tool: SlowTool) -> None:
        self._tokenizer, self._tool = tokenizer, tool
        self.prompts: list[Any] = []
        self.completion_ids: list[list[int]] = []

    def counts(self, logs: dict[str, float]) -> dict[str, Any]:
        """The numbers that both contestants must agree on."""
        calls, self._tool.calls = self._tool.calls, 0
        prompts = self._tokenizer.apply_chat_template(self.prompts, add_generation_prompt=True, return_dict=False)
        sequences = len(self.completion_ids)
        return {
            "sequences": sequences,
            "prompt_tokens": sum(map(len, prompts)),
            "response_tokens": sum(map(len, self.completion_ids)),
            "sampled_tokens": round(logs["completions/mean_length"] * sequences),
            "tool_calls": calls,
            "tool_failures": round(logs.get("tools/failure_frequency", 0.0) * calls),
        }


def main(case: str, folder: Path, steps: int, *, pool: bool) -> None:
    """Train for some steps, one at each turn."""
    options = {**_read("base"), **_read(case)}
    policy = folder / "policy"
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(policy, dtype="float32", attn_implementation="sdpa")
    rows = [json.loads(line) for line in (policy / "prompts.jsonl").read_text().splitlines()]
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": row["question"]}]} for row in rows])
    config = GRPOConfig(output_dir=str(folder / "trl-run"), max_steps=steps, **options)
    tool = SlowTool(max(1, config.generation_batch_size * (config.max_tool_calling_iterations or 0)))
    seen = Seen(tokenizer, tool)

    def wait(ticket: str) -> str:
        """Wait, then answer.

        Args:
            ticket: what to wait for.
        """
        return tool()

    def reward(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.prompts, seen.completion_ids = prompts, completion_ids
        return [even_words(" ".join(message["content"] for message in messages)) for messages in completions]

    calls = config.max_tool_calling_iterations
    if calls:
        # A call ends the turn: TRL stops where the model's generation config says that a turn ends.
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(f"</{TOOL}>")]
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[StepClock(seen.counts)],
        tools=[wait] if calls and not pool else None,
        rollout_func=PooledTools(tool, calls) if pool else None,
    )
    trainer.train()


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((HERE / "trl" / f"{name}.yaml").read_text())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), pool="--pool" in sys.argv[4:])
