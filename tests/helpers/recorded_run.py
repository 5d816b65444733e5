"""A short training run with web search and a Python interpreter, and what is kept of it to be repeated without them.

Nothing in it leaves a token to the last digits, which depend on the processor: weights are drawn as integers, sequences
are sampled one at a time, and few steps follow each other. ``tools/record_run.py`` tries that before it keeps a run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from appo_lightning.rollout.limits import RolloutLimits
from appo_lightning.samplers.transformers import TransformersSampler
from appo_lightning.tasks.lookup import create_tiny_policy
from appo_lightning.tools._provider import SearchProvider
from appo_lightning.tools.python import PythonTool
from appo_lightning.tools.recording import on_record
from appo_lightning.tools.web import WebSearchTool
from helpers.training import Result, Run, fit

FOLDER = Path(__file__).parents[1] / "data" / "recorded_run"
CALLS, EXPECTED = FOLDER / "calls.jsonl", FOLDER / "expected.json"
RECORD_AGAIN = ".venv/bin/python tools/record_run.py"
SEED = 1  # of the weights
PORT = 18477  # of the search service; in the recording, so always the same

# Single tokens, so that a random policy makes calls that a tool can answer, and some that build on earlier ones.
_CALLS = (
    "<search>age of Bako</search>",
    "<search>population of",
    "<python>x = 7; x</python>",
    "<python>x + 1</python>",
    "<python>print(",
)
_LEAN = 0.6
_COMPARED = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight")


class RecordedRun(Run):
    """A run whose tools are recorded or replayed."""

    paths: dict[str, str | None]
    cache = ""

    def data(self, sampler: Any = None) -> Any:
        url = f"http://127.0.0.1:{PORT}/search"
        provider = SearchProvider(url, params={"q": "{query}"}, results="web.results", text="snippet")
        data = super().data(sampler)
        data.tools = on_record([WebSearchTool(provider, self.cache, top_k=1), PythonTool(timeout_s=20)], **self.paths)
        data.rollout = RolloutLimits(max_prompt_tokens=64, max_response_tokens=48, max_result_tokens=12)
        return data


def train(folder: Path, *, record: Path | None = None, replay: Path | None = None, noise: float = 0.0) -> Result:
    """Train a fresh policy.

    Args:
        folder: for the policy and the cache of the search.
        record: where the calls are recorded.
        replay: where they are replayed from.
        noise: standard deviation of what is added to each weight at the start, relative to it.
    """
    policy = make_policy(folder / "policy", noise)
    run = RecordedRun(policy, max_steps=3, prompts_per_phase=8, prompts_per_mini_batch=4)
    run.paths = {"record": record and str(record), "replay": replay and str(replay)}
    run.cache = str(folder / "web.sqlite")
    return fit(run, sampler=TransformersSampler(max_batch_size=1))


def make_policy(folder: Path, noise: float = 0.0) -> str:
    """A tiny policy whose samples hold the tags of both tools."""
    create_tiny_policy(folder, hidden_size=32, num_layers=1)
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in _CALLS])
    policy.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() > 1:
                # Four integers added up are nearly normal, here with a deviation of 0.2.
                draws = torch.randint(-512, 512, (4, *parameter.shape), generator=generator).sum(0)
                parameter.copy_(draws / 2956)
        # Every hidden state leans to one side, and so do these rows of the head.
        embedding = policy.get_input_embeddings().weight
        embedding += 0.125
        for text in (*_CALLS, "</search>", "</python>"):
            embedding[tokenizer.convert_tokens_to_ids(text)] += _LEAN
        for parameter in policy.parameters():
            parameter *= 1 + noise * torch.randn(parameter.shape)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def exact_facts(result: Result) -> list[dict[str, Any]]:
    """Every rollout of the run, in the order of steps and tasks: what another processor must repeat."""
    return [
        {
            "step": step,
            "task": task,
            "branch": "position" in rollout,
            "tokens": rollout["response_ids"],
            "calls": [
                [call["name"], call["argument"], call["result"], call["error"]] for call in rollout["tool_calls"]
            ],
            "reward": rollout["reward"],
        }
        for step, trees in sorted(result.rollouts.items())
        for task, tree in sorted(trees.items())
        for rollout in (*tree["roots"], *tree["branches"])
    ]


def near_facts(result: Result) -> dict[str, list[float]]:
    """Numbers whose last digits depend on the processor."""
    rollouts = [rollout for trees in result.rollouts.values() for tree in trees.values() for rollout in tree["roots"]]
    return {
        "log-prob of each root": [sum(rollout["behaviour_logprobs"]) for rollout in rollouts],
        "loss": result.series("loss/policy"),
        **{name: result.weights[name].flatten()[:24].tolist() for name in _COMPARED},
    }
