"""Measure the update's forward and backward pass: chunked logits against all at once, shared prefixes against none.

    OMP_NUM_THREADS=1 python tools/bench_update.py --json runs/bench_update.json
    python tools/bench_update.py --device cuda --hidden 1024 --layers 28 --budget 32768

First table: one row of tokens, a body of one layer, two vocabularies. Each case runs in a process of its own; its
memory is the high-water mark over what was held just before, so weights and libraries are not in it, gradients are: of
the resident set (VmHWM of /proc/self/status, Linux), on a GPU of torch's allocator. Second table: a random policy on
trees of rollouts, the two ways in one process. The two sides of a ratio always take turns, so that a busy machine slows
both; figures are medians. On a GPU the weights are bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarking import machine, write_figures

VOCABULARIES = [32_768, 151_936]
HIDDEN = 64  # of the first table
OUT_OF_MEMORY = float("inf")


@dataclass(frozen=True)
class Trees:
    """Rollouts of some prompts: roots, and branches that keep the first half of a root's response."""

    name: str
    prompts: int
    prompt_tokens: int
    response_tokens: int
    roots: int
    branches: int
    hidden: int = 128
    layers: int = 2
    instructions: int = 0  # tokens that all prompts begin with


SHAPES = (
    Trees("quick start", 16, 20, 60, 4, 4),
    Trees("quick start, no branches", 16, 20, 60, 4, 0),
    Trees("equal, branches", 1, 256, 256, 4, 4, hidden=256),
    Trees("long prompt", 1, 1024, 128, 8, 0, hidden=256),
    Trees("long prompt, branches", 1, 1024, 128, 4, 4, hidden=256),
    Trees("long response", 1, 128, 768, 8, 0, hidden=256),
    Trees("many rows, branches", 8, 512, 512, 4, 4, hidden=256),
    Trees("common instructions", 16, 32, 64, 1, 0, hidden=256, instructions=256),
    Trees("nothing shared, short", 64, 20, 60, 1, 0),
    Trees("nothing shared, long", 4, 128, 768, 1, 0, hidden=256),
)


def save_policy(directory: Path, *, vocabulary: int, hidden: int, layers: int) -> str:
    """A random policy with some tokenizer."""
    head = 128 if hidden >= 1024 else 32
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    from helpers.tiny import build_tokenizer

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // head,
        num_key_value_heads=hidden // head,
        head_dim=head,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return str(directory)


def load_policy(path: str, device: str, **options: Any) -> Any:
    """A policy in training on a device."""
    import torch

    from appo_lightning.policy.causal_lm import CausalPolicy
    from appo_lightning.policy.options import PolicyOptions

    torch.set_num_threads(1)
    dtype = "float32" if device == "cpu" else "bfloat16"
    return CausalPolicy(PolicyOptions(path, dtype=dtype, **options)).to(device).train()


def clock(device: str) -> float:
    """Seconds, all work done."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


class PeakMemory:
    """High-water mark of the process, on a GPU of torch's allocator, over what is held when it is made."""

    def __init__(self, device: str) -> None:
        self._device = device
        if device == "cpu":
            with contextlib.suppress(OSError):  # without it, loading may have been the peak: never in these cases
                Path("/proc/self/clear_refs").write_text("5")
            self._before = self._resident_mb("VmRSS")
        else:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20

    def mb(self) -> float:
        """Until now."""
        if self._device == "cpu":
            return self._resident_mb("VmHWM") - self._before
        import torch

        return torch.cuda.max_memory_allocated() / 2**20 - self._before

    @staticmethod
    def _resident_mb(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def vocabulary_case(path: str, device: str, vocabulary: int, tokens: int, chunk: int | None) -> dict[str, float]:
    """Memory and speed of one forward and backward pass; ``chunk`` None: all logits at once."""
    import torch

    policy = load_policy(path, device, logit_chunk=chunk or 1)
    generator = torch.Generator().manual_seed(0)

    def update(count: int) -> None:
        ids = torch.randint(vocabulary, (1, count), generator=generator).to(device)
        if chunk is None:
            log_p = policy.model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            logprobs = log_p.gather(-1, ids[:, 1:, None])
        else:
            logprobs = policy.score(ids, torch.tensor([count], device=device)).logprobs
        (-logprobs.sum() / count).backward()
        policy.zero_grad()

    update(8)
    try:
        if device != "cpu":  # the first call with a shape chooses kernels
            update(tokens)
        peak, began = PeakMemory(device), clock(device)
        update(tokens)
    except torch.OutOfMemoryError:
        return {"peak_mb": OUT_OF_MEMORY, "tokens_per_second": 0.0}
    return {"tokens_per_second": tokens / (clock(device) - began), "peak_mb": peak.mb()}


def in_own_process(*case: Any) -> dict[str, float]:
    """``vocabulary_case`` in a fresh interpreter."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def compare_vocabulary(
    vocabulary: int, lengths: list[int], chunk: int, rounds: int, *, device: str, hidden: int
) -> list[dict[str, Any]]:
    """Chunked against plain, by length."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = save_policy(Path(folder), vocabulary=vocabulary, hidden=hidden, layers=1)
        for tokens in lengths:
            pairs = [
                tuple(in_own_process(path, device, vocabulary, tokens, size) for size in (None, chunk))
                for _ in range(rounds)
            ]
            row: dict[str, Any] = {"vocabulary": vocabulary, "tokens": tokens, "chunk": chunk}
            for field in ("peak_mb", "tokens_per_second"):
                row[f"plain_{field}"] = statistics.median(plain[field] for plain, _ in pairs)
                row[f"chunked_{field}"] = statistics.median(chunked[field] for _, chunked in pairs)
                row[f"ratio_{field}"] = statistics.median(
                    chunked[field] / plain[field] if plain[field] else OUT_OF_MEMORY for plain, chunked in pairs
                )
            rows.append(row)
    return rows


def sample_trees(shape: Trees) -> tuple[Any, Any, Any]:
    """Token ids, lengths and mask of random rollouts."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return torch.randint(5, 500, (count,), generator=generator).tolist()

    rows, starts = [], []
    instructions = some(shape.instructions)
    prompt_tokens = shape.instructions + shape.prompt_tokens
    for _ in range(shape.prompts):
        start = instructions + some(shape.prompt_tokens)
        spread = max(1, shape.response_tokens // 2)
        sizes = (shape.response_tokens - spread // 2 + torch.randint(spread, (8,), generator=generator)).tolist()
        roots = [start + some(sizes[n % 8]) for n in range(shape.roots)]
        kept = prompt_tokens + shape.response_tokens // 2
        branches = [roots[n % shape.roots][:kept] + some(shape.response_tokens // 2) for n in range(shape.branches)]
        rows += roots + branches
        starts += [prompt_tokens] * shape.roots + [kept] * shape.branches
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros((len(rows), int(lengths.max())), dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
    positions = torch.arange(ids.shape[1])[None]
    mask = (positions >= torch.tensor(starts)[:, None]) & (positions < lengths[:, None])
    return ids, lengths, mask


def compare_prefixes(shape: Trees, *, budget: int, rounds: int, device: str) -> dict[str, Any]:
    """Seconds of one update over all rows, with and without shared prefixes, planning and packing included."""
    import torch

    from appo_lightning.batching import split_by_tokens
    from appo_lightning.policy.tree_packing import pack_tree, plan_packs

    with tempfile.TemporaryDirectory() as folder:
        path = save_policy(Path(folder), vocabulary=512, hidden=shape.hidden, layers=shape.layers)
        policy = load_policy(path, device)
    policy.share_prefixes()
    ids, lengths, mask = sample_trees(shape)
    tokens = {"separate": int(lengths.sum()), "shared": 0}

    def step(rows: Any, packing: Any) -> float:
        width = int(lengths[rows].max())
        inputs = (tensor.to(device) for tensor in (ids[rows, :width], lengths[rows], mask[rows, :width]))
        token_ids, sizes, scored_mask = inputs
        scored = policy.score(token_ids, sizes, mask=scored_mask, packing=packing)
        loss = -scored.logprobs.sum() / int(mask.sum())
        loss.backward()
        return float(loss.detach())

    def separate() -> float:
        return sum(step(rows, None) for rows in split_by_tokens(lengths, budget))

    def shared() -> float:
        packs = plan_packs(ids, lengths, budget=budget)
        tokens["shared"] = sum(pack.length for pack in packs)
        total = 0.0
        for pack in packs:
            rows = torch.tensor(pack.rows)
            total += step(rows, pack_tree(ids[rows], lengths[rows], pack).to(device))
        return total

    seconds: dict[str, list[float]] = {"separate": [], "shared": []}
    losses = {}
    for turn in range(rounds + 1):
        for name, run in (("separate", separate), ("shared", shared)):
            policy.zero_grad()
            began = clock(device)
            losses[name] = run()
            if turn:  # the first warms up
                seconds[name].append(clock(device) - began)
    assert abs(losses["separate"] - losses["shared"]) < (1e-4 if device == "cpu" else 0.05), losses
    trained = int(mask.sum())
    return {
        "shape": shape.name,
        "rows": len(lengths),
        "row_tokens": tokens["separate"],
        "computed_share": tokens["shared"] / tokens["separate"],
        **{f"{name}_tokens_per_second": trained / statistics.median(taken) for name, taken in seconds.items()},
        "ratio": statistics.median(a / b for a, b in zip(seconds["separate"], seconds["shared"], strict=True)),
    }


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096], help="tokens of the first table")
    parser.add_argument("--vocabularies", type=int, nargs="*", default=VOCABULARIES, help="of the first table")
    parser.add_argument("--chunk", type=int, default=1024, help="logit_chunk of the first table (default 1024)")
    parser.add_argument("--budget", type=int, default=16384, help="micro_batch_tokens of the second table")
    parser.add_argument("--shapes", nargs="*", help="shapes of the second table, by name (default all; none skips it)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--hidden", type=int, help=f"hidden size (default {HIDDEN}, in the second table the shape's)")
    parser.add_argument("--layers", type=int, help="layers of the second table (default the shape's)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(vocabulary_case(*json.loads(options.case))))
        return

    vocabulary = []
    for size in options.vocabularies if options.lengths else []:
        print(f"{f'V = {size:,}, chunk {options.chunk}:':34}{'plain':>12}{'chunked':>12}{'chunked / plain':>17}")
        rows = compare_vocabulary(
            size,
            options.lengths,
            options.chunk,
            options.rounds,
            device=options.device,
            hidden=options.hidden or HIDDEN,
        )
        vocabulary += rows
        for row in rows:
            for field, unit in (("peak_mb", "peak, MB"), ("tokens_per_second", "tokens/s")):
                name = f"{row['tokens']:,} tokens, {unit}"
                plain, chunked = row[f"plain_{field}"], row[f"chunked_{field}"]
                print(f"{name:34}{plain:12,.0f}{chunked:12,.0f}{row[f'ratio_{field}']:17.2f}", flush=True)
    wanted = [shape for shape in SHAPES if options.shapes is None or shape.name in options.shapes]
    prefixes = []
    print(f"{'trained tokens/s':34}{'separate':>12}{'shared':>12}{'computed':>10}{'speed-up':>10}")
    for shape in wanted:
        changes = {"hidden": options.hidden or shape.hidden, "layers": options.layers or shape.layers}
        sized = replace(shape, **changes)
        row = compare_prefixes(sized, budget=options.budget, rounds=options.rounds, device=options.device)
        prefixes.append(row)
        speeds = f"{row['separate_tokens_per_second']:12,.0f}{row['shared_tokens_per_second']:12,.0f}"
        print(f"{row['shape']:34}{speeds}{row['computed_share']:10.2f}{row['ratio']:10.2f}", flush=True)
    figures = {
        **machine(options.device),
        "rounds": options.rounds,
        "vocabulary": vocabulary,
        "shared_prefixes": prefixes,
    }
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
