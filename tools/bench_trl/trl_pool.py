"""A rollout function for TRL that a user could write: generate all, then all tools in a pool, then generate all.

GRPOTrainer's own loop calls the tools of a step one after the other. With this one TRL waits for the slowest only.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from shared import TOOL

WORKERS = 16  # as many as data.rollout.tool_workers of ours


class PooledTools:
    """``rollout_func`` of GRPOTrainer: one completion for each prompt.

    Args:
        tool: called without an argument.
        max_calls: of a response.
    """

    def __init__(self, tool: Callable[[], str], max_calls: int) -> None:
        self._tool, self._max_calls = tool, max_calls

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        tokenizer = trainer.processing_class
        close = tokenizer.convert_tokens_to_ids(f"</{TOOL}>")
        prompt_ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)
        completions: list[list[int]] = [[] for _ in prompts]
        sampled: list[list[int]] = [[] for _ in prompts]
        live = list(range(len(prompts)))
        with ThreadPoolExecutor(WORKERS) as pool:
            for turn in range(self._max_calls + 1):
                contexts = [prompt_ids[i] + completions[i] for i in live]
                for i, new in zip(live, self._generate(trainer, contexts), strict=True):
                    completions[i] += new
                    sampled[i] += [1] * len(new)
                live = [i for i in live if completions[i][-1] == close]
                if not live or turn == self._max_calls:
                    break
                for i, text in zip(live, pool.map(lambda _: self._tool(), live), strict=True):
                    result = tokenizer.encode(f"<result>{text}</result>", add_special_tokens=False)
                    completions[i] += result
                    sampled[i] += [0] * len(result)
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None, "env_mask": sampled}

    @torch.no_grad()
    def _generate(self, trainer: Any, contexts: list[list[int]]) -> list[list[int]]:
        inputs = trainer.processing_class.pad({"input_ids": contexts}, padding_side="left", return_tensors="pt")
        model = trainer.accelerator.unwrap_model(trainer.model)
        answers = model.generate(**inputs, generation_config=trainer.generation_config)
        ends = set(trainer.eos_token_ids)
        return [_until(answer, ends) for answer in answers[:, inputs["input_ids"].shape[1] :].tolist()]


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """Up to the first of some tokens, which is included: padding follows it."""
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: stop + 1]
