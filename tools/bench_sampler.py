"""Compare both samplers on one policy: tokens per second, start-up, weight synchronisation.

    python tools/bench_sampler.py --json runs/bench_sampler.json

The two take turns in one process, so that a busy machine slows both; the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from appo_lightning.samplers.base import Sampler, SampleRequest, generate
from appo_lightning.samplers.transformers import TransformersSampler
from appo_lightning.samplers.vllm import VLLMSampler
from benchmarking import checkpoint_or_tiny, machine, seconds, write_figures

STOP = ("</python>", "</search>", "</answer>")


def tokens_per_second(sampler: Sampler, num_sequences: int, max_tokens: int, stop: tuple[str, ...]) -> float:
    """Generated tokens over the time from the first request to the last completion."""
    requests = [SampleRequest(i, [5, 6, 7, 8 + i % 200], max_tokens, seed=i, stop=stop) for i in range(num_sequences)]
    before = sampler.stats().generated_tokens
    taken = seconds(lambda: generate(sampler, requests))
    return (sampler.stats().generated_tokens - before) / taken


def compare(samplers: dict[str, Sampler], *, rounds: int, **workload: Any) -> dict[str, float]:
    """Median tokens per second of each sampler and the median of the ratio within a round."""
    measured: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sampler in samplers.items():
            measured[name].append(tokens_per_second(sampler, **workload))
    ratios = [fast / slow for fast, slow in zip(measured["vllm"], measured["transformers"], strict=True)]
    return {
        **{name: statistics.median(speeds) for name, speeds in measured.items()},
        "ratio": statistics.median(ratios),
    }


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a transformers checkpoint; default: a random policy of 0.1M parameters")
    parser.add_argument("--sequences", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = checkpoint_or_tiny(options.checkpoint)
    policy = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    torch.set_num_threads(1)  # what VLLMSampler samples with

    samplers: dict[str, Sampler] = {
        "vllm": VLLMSampler(),
        "transformers": TransformersSampler(max_batch_size=max(options.sequences)),
    }
    length = 4 + options.max_tokens
    start = {
        name: seconds(lambda s=sampler: s.start(checkpoint, tokenizer, max_length=length))  # type: ignore[misc]
        for name, sampler in samplers.items()
    }
    for sampler in samplers.values():
        tokens_per_second(sampler, 16, 8, ())

    rows = []
    for num_sequences in options.sequences:
        for stop in ((), STOP):
            speeds = compare(
                samplers, rounds=options.rounds, num_sequences=num_sequences, max_tokens=options.max_tokens, stop=stop
            )
            rows.append({"sequences": num_sequences, "stop_strings": len(stop), **speeds})
    sync = {
        name: statistics.median(
            seconds(lambda s=sampler: s.load_weights(policy.named_parameters())) * 1000  # type: ignore[misc]
            for _ in range(10)
        )
        for name, sampler in samplers.items()
    }

    print(f"{'':32}{'vllm':>12}{'transformers':>14}{'ratio':>8}")
    print(f"{'start-up, s (vllm: import too)':32}{start['vllm']:12.2f}{start['transformers']:14.2f}")
    print(f"{'weight sync, ms':32}{sync['vllm']:12.1f}{sync['transformers']:14.1f}")
    for row in rows:
        name = f"tokens/s, {row['sequences']} seq., {row['stop_strings']} stops"
        print(f"{name:32}{row['vllm']:12,.0f}{row['transformers']:14,.0f}{row['ratio']:8.2f}")
    figures = {
        "policy_parameters": sum(parameter.numel() for parameter in policy.parameters()),
        **machine(),
        "max_tokens": options.max_tokens,
        "rounds": options.rounds,
        "start_seconds": start,
        "sync_milliseconds": sync,
        "tokens_per_second": rows,
    }
    write_figures(options.json, figures)
    for sampler in samplers.values():
        sampler.close()


if __name__ == "__main__":
    main()
