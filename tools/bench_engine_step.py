"""What the sampler takes from a step of vLLM on a CPU: with and without each part, in one engine.

    OMP_NUM_THREADS=1 python tools/bench_engine_step.py --checkpoint runs/quickstart/sft_policy

CPU milliseconds of one step that generates a token for each sequence. All variants take turns; a ratio is the median
over rounds of a variant over vLLM's own step.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from appo_lightning.samplers import vllm as sampler
from appo_lightning.samplers.base import SampleRequest
from appo_lightning.samplers.vllm import VLLMSampler
from benchmarking import checkpoint_or_tiny, machine, write_figures

PARTS = ("norms", "draws", "ranks", "blocks", "logprobs")
VARIANTS: dict[str, tuple[str, ...]] = {"vLLM's own": (), **{part: (part,) for part in PARTS}, "all": PARTS}
PROMPT_TOKENS = 40


class Bench:
    """An engine whose parts are switched."""

    def __init__(self, checkpoint: str, slots: int, tokens: int) -> None:
        from transformers import AutoTokenizer

        self.tokens, self._drawn = tokens, 0
        self._sampler = VLLMSampler(max_num_seqs=slots)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._sampler.start(checkpoint, tokenizer, max_length=PROMPT_TOKENS + tokens)
        self._sampler._eos_token_ids = frozenset()
        engine: Any = self._sampler._engine
        runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self._draw = runner.sampler.topk_topp_sampler

    @contextlib.contextmanager
    def using(self, parts: tuple[str, ...]) -> Iterator[None]:
        """Only these parts of the package's, the others vLLM's own."""
        import vllm.v1.sample.sampler as sampling
        from vllm import ir
        from vllm.v1.core.kv_cache_manager import KVCacheManager

        priority = ["appo_cpu", "native"] if "norms" in parts else ["native"]
        ours, ranks = type(self._draw).forward_cpu, sampling.batched_count_greater_than
        forward = ours if "draws" in parts else ours.__wrapped__
        allocate: Any = KVCacheManager.allocate_slots
        collect: Any = sampler.SampledLogprobs
        with ir.ops.rms_norm.set_priority(priority), ir.ops.fused_add_rms_norm.set_priority(priority):
            self._draw.forward = functools.partial(forward, self._draw)
            if "ranks" not in parts:
                # As vLLM counts them, but for its compiler, which is not everywhere.
                sampling.batched_count_greater_than = lambda x, values: (x >= values).sum(-1)
            if "blocks" not in parts:
                KVCacheManager.allocate_slots = allocate.__wrapped__
            if "logprobs" not in parts:
                sampler.SampledLogprobs = _theirs
            try:
                yield
            finally:
                sampling.batched_count_greater_than = ranks
                KVCacheManager.allocate_slots = allocate
                sampler.SampledLogprobs = collect

    def milliseconds(self, sequences: int) -> float:
        """CPU time of a step, without the first, which reads the prompts."""
        self._drawn += 1
        for row in range(sequences):
            prompt = [5 + (row * 7 + k * k + self._drawn) % 200 for k in range(PROMPT_TOKENS)]
            self._sampler.submit(SampleRequest(row, prompt, self.tokens, seed=self._drawn * 1000 + row))
        self._sampler.step()
        steps, began = 0, time.thread_time()
        while self._sampler.num_unfinished:
            self._sampler.step()
            steps += 1
        return 1000 * (time.thread_time() - began) / steps

    def close(self) -> None:
        """End the engine."""
        self._sampler.close()


def _theirs() -> Any:
    """A request's log-prob processor as vLLM makes it."""
    from vllm.v1.engine.logprobs import FlatLogprobs, LogprobsProcessor

    return LogprobsProcessor(
        tokenizer=None,
        logprobs=FlatLogprobs(),
        prompt_logprobs=None,
        cumulative_logprob=0.0,
        num_logprobs=0,
        num_prompt_logprobs=None,
    )


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a transformers checkpoint; default: a random policy of 0.1M parameters")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()

    checkpoint = checkpoint_or_tiny(options.checkpoint)
    torch.set_num_threads(1)  # what VLLMSampler samples with
    bench = Bench(checkpoint, max(options.sequences), options.tokens)
    for sequences in options.sequences:
        bench.milliseconds(sequences)

    print(f"{'CPU ms of a step':20}" + "".join(f"{name:>14}" for name in VARIANTS) + f"{'all / own':>12}")
    rows = []
    for sequences in options.sequences:
        taken: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for number in range(options.rounds):
            for name in list(VARIANTS)[:: 1 if number % 2 == 0 else -1]:
                with bench.using(VARIANTS[name]):
                    taken[name].append(bench.milliseconds(sequences))
        own = taken["vLLM's own"]
        ratios = {
            name: statistics.median(a / b for a, b in zip(times, own, strict=True)) for name, times in taken.items()
        }
        medians = {name: statistics.median(times) for name, times in taken.items()}
        rows.append({"sequences": sequences, "milliseconds": medians, "ratio": ratios})
        print(f"{f'{sequences} sequences':20}" + "".join(f"{ms:14.2f}" for ms in medians.values()), end="")
        print(f"{ratios['all']:12.2f}", flush=True)
    figures = {**machine(), "rounds": options.rounds, "rows": rows}
    write_figures(options.json, figures)
    bench.close()


if __name__ == "__main__":
    main()
