"""Measure training steps on one GPU that holds trainer and sampler: all weights or LoRA, with and without sleep.

    python tools/bench_gpu.py --json runs/bench_gpu.json

Each row is an ``appo fit`` of its own on the quick start's tasks with ``configs/trainer/single_gpu.yaml``. The policy
has the shape of Qwen3-0.6B (an output layer of its own, random weights) and never ends a response or calls a tool, so
that all rows sample and train the same number of tokens. Seconds are medians of the steps after the first, which starts
the engine. ``used`` is what all of the process holds of the device, read before and after each training step and after
each push; ``trained`` and ``sampled`` are tokens per second of the update and of the tool loop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarking import machine, write_figures

ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, int]] = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
}
SLEEP = ("--data.sampler.init_args.sleep_between_phases", "true")
LORA = ("--model.policy.lora", json.dumps({"rank": 16, "alpha": 32.0}))
WAYS: dict[str, tuple[str, ...]] = {
    "all weights": (),
    "all weights, sleep": SLEEP,
    "LoRA, merged": LORA,
    "LoRA, adapter": (*LORA, "--sync.lora", "adapter"),
    "LoRA, adapter, sleep": (*LORA, "--sync.lora", "adapter", *SLEEP),
    "all weights, eager engine": ("--data.sampler.init_args.enforce_eager", "true"),
}
FIGURES = {
    "step": "time/step",
    "roots": "time/sample_roots",
    "branches": "time/sample_branches",
    "score": "time/score",
    "update": "time/update",
    "push": "sync/push_seconds",
    "check": "sync/check_seconds",
    "sampled": "time/sampled_tokens_per_second",
    "trained": "time/trained_tokens_per_second",
}


def save_policy(directory: Path, shape: dict[str, int], vocabulary: int) -> None:
    """A random policy that says ordinary words for ever."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    from appo_lightning.tasks.lookup.tokenizer import build_tokenizer

    logging.disable_progress_bar()
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        **shape,
        vocab_size=vocabulary,
        num_key_value_heads=shape["num_attention_heads"] // 2,
        head_dim=128 if shape["hidden_size"] >= 1024 else 32,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        policy = Qwen3ForCausalLM(config).to(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.mul_(1e-3)  # what leans to one side in the embedding still does in the last layer
            policy.get_input_embeddings().weight.add_(0.02)
            head = policy.get_output_embeddings().weight
            words = [token for text, token in tokenizer.get_vocab().items() if text.isalpha()]
            silent = torch.ones(vocabulary, dtype=torch.bool)
            silent[words] = False
            head[silent] = -0.05
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    del policy, head, parameter
    torch.cuda.empty_cache()  # the cases tell what is used of the device


def run_case(way: str, checkpoint: str, folder: str, steps: int, arguments: list[str]) -> dict[str, Any]:
    """A training run in this process."""
    import torch
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from appo_lightning.cli import main as appo
    from appo_lightning.module import AppoModule
    from appo_lightning.samplers.vllm import VLLMSampler

    on_gpu = torch.cuda.is_available()
    used: dict[str, list[float]] = {"training": [0.0], "sampling": [0.0]}

    def note(where: str) -> None:
        if on_gpu:
            free, total = torch.cuda.mem_get_info()
            used[where].append((total - free) / 2**30)

    def noting(owner: Any, name: str, where: str, *, before: bool = False) -> None:
        function = getattr(owner, name)

        def wrapped(self: Any, *args: Any, **options: Any) -> Any:
            if before:
                note(where)
            result = function(self, *args, **options)
            note(where)
            return result

        setattr(owner, name, wrapped)

    noting(AppoModule, "training_step", "training", before=True)
    noting(VLLMSampler, "load_weights", "sampling")
    noting(VLLMSampler, "load_adapter", "sampling")
    output = f"{folder}/run"
    began = time.perf_counter()
    command = [
        *("fit", "--config", str(ROOT / "configs/quickstart/appo.yaml")),
        *(("--config", str(ROOT / "configs/trainer/single_gpu.yaml")) if on_gpu else ()),
        *("--model.policy.path", checkpoint, "--output_dir", output, "--export.path", "null"),
        *("--trainer.max_steps", str(steps), "--checkpoint.every_n_train_steps", str(10 * steps)),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
        *("--model.optimizer.learning_rate", "1e-6", "--trainer.log_every_n_steps", "1"),
        *arguments,
        *WAYS[way],
    ]
    assert appo(command) == 0
    seconds = time.perf_counter() - began
    events = EventAccumulator(output).Reload()
    found = {
        name: statistics.median([event.value for event in events.Scalars(tag)][1:]) for name, tag in FIGURES.items()
    }
    return {
        "way": way,
        **found,
        "canary_gap": max(event.value for event in events.Scalars("sync/canary_gap")),
        "run": seconds,
        "used_training_gib": max(used["training"]),
        "used_sampling_gib": max(used["sampling"]),
        "trainer_peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
    }


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    numbers = "".join(f"{row[name]:9.3f}" for name in list(FIGURES)[:7])
    speeds = f"{row['sampled']:10,.0f}{row['trained']:10,.0f}"
    print(f"{row['way']:28}{numbers}{speeds}{row['used_training_gib']:9.1f}{row['used_sampling_gib']:9.1f}", flush=True)


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="0.6B")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=16, help="per optimiser step; a phase has two")
    parser.add_argument("--tokens", type=int, default=512, help="of each response")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run_case(*json.loads(options.case))))
        return

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = [
        *("--data.prompts_per_mini_batch", str(options.prompts), "--data.prompts_per_phase", str(2 * options.prompts)),
        *("--data.rollout.max_response_tokens", str(options.tokens), "--model.micro_batch_tokens", "32768"),
        *("--model.score_batch_tokens", "32768"),
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = f"{folder}/policy"
        save_policy(Path(checkpoint), SHAPES[options.shape], options.vocabulary)
        names = "".join(f"{name:>9}" for name in list(FIGURES)[:7])
        print(
            f"{options.shape + ', s and GiB':28}{names}{'sampled/s':>10}{'trained/s':>10}{'training':>9}{'sampling':>9}"
        )
        for way in options.ways:
            case = json.dumps([way, checkpoint, f"{folder}/{way}", options.steps, arguments])
            command = [sys.executable, __file__, "--case", case]
            done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
            if done.returncode != 0:
                print(f"{way:28} failed with exit code {done.returncode}", flush=True)
                continue
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            show(rows[-1])
    write_figures(options.json, {**machine(device), "shape": options.shape, "rows": rows})


if __name__ == "__main__":
    main()
