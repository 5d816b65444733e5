"""Measure the update's forward and backward pass: chunked logits against all at once, shared prefixes against none.

    OMP_NUM_THREADS=1 python tools/bench_update.py --json runs/bench_update.json

First table: one row of tokens, a body of one small layer, two vocabularies. Each case runs in a process of its own;
its memory is the high-water mark of the resident set (VmHWM of /proc/self/status, Linux) over the resident set just
before, so weights and libraries are not in it, gradients are. Second table: a random policy on trees of rollouts, the
two ways in one process. The two sides of a ratio always take turns, so that a busy machine slows both; figures are
medians.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarking import write_figures

VOCABULARIES = [32_768, 151_936]
HIDDEN = 64


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
    Trees("common instructions", 16, 32, 64, 1, 0, hidden=256, instructions=256),
    Trees("nothing shared, short", 64, 20, 60, 1, 0),
    Trees("nothing shared, long", 4, 128, 768, 1, 0, hidden=256),
)


def save_policy(directory: Path, *, vocabulary: int, hidden: int, layers: int) -> str:
    """A random policy with some tokenizer."""
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
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return str(directory)


def resident_mb(field: str) -> float:
    """VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def vocabulary_case(path: str, vocabulary: int, tokens: int, chunk: int | None) -> dict[str, float]:
    """Memory and speed of one forward and backward pass; ``chunk`` None: all logits at once."""
    import torch

    from appo_lightning.policy.causal_lm import CausalPolicy
    from appo_lightning.policy.options import PolicyOptions

    torch.set_num_threads(1)
    policy = CausalPolicy(PolicyOptions(path, logit_chunk=chunk or 1)).train()
    generator = torch.Generator().manual_seed(0)

    def update(count: int) -> None:
        ids = torch.randint(vocabulary, (1, count), generator=generator)
        if chunk is None:
            log_p = policy.model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            logprobs = log_p.gather(-1, ids[:, 1:, None])
        else:
            logprobs = policy.score(ids, torch.tensor([count])).logprobs
        (-logprobs.sum() / count).backward()
        policy.zero_grad()

    update(8)
    with contextlib.suppress(OSError):  # without it, loading may have been the peak: never in these cases
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_mb("VmRSS")
    began = time.perf_counter()
    update(tokens)
    seconds = time.perf_counter() - began
    return {"peak_mb": resident_mb("VmHWM") - before, "tokens_per_second": tokens / seconds}


def in_own_process(*case: Any) -> dict[str, float]:
    """``vocabulary_case`` in a fresh interpreter."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def compare_vocabulary(vocabulary: int, lengths: list[int], chunk: int, rounds: int) -> list[dict[str, Any]]:
    """Chunked against plain, by length."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = save_policy(Path(folder), vocabulary=vocabulary, hidden=HIDDEN, layers=1)
        for tokens in lengths:
            pairs = [
                (in_own_process(path, vocabulary, tokens, None), in_own_process(path, vocabulary, tokens, chunk))
                for _ in range(rounds)
            ]
            row: dict[str, Any] = {"vocabulary": vocabulary, "tokens": tokens, "chunk": chunk}
            for field in ("peak_mb", "tokens_per_second"):
                row[f"plain_{field}"] = statistics.median(plain[field] for plain, _ in pairs)
                row[f"chunked_{field}"] = statistics.median(chunked[field] for _, chunked in pairs)
                row[f"ratio_{field}"] = statistics.median(chunked[field] / plain[field] for plain, chunked in pairs)
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


def compare_prefixes(shape: Trees, *, budget: int, rounds: int) -> dict[str, Any]:
    """Seconds of one update over all rows, with and without shared prefixes, planning and packing included."""
    import torch

    from appo_lightning.batching import split_by_tokens
    from appo_lightning.policy.causal_lm import CausalPolicy
    from appo_lightning.policy.options import PolicyOptions
    from appo_lightning.policy.tree_packing import pack_tree, plan_packs

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = save_policy(Path(folder), vocabulary=512, hidden=shape.hidden, layers=shape.layers)
        policy = CausalPolicy(PolicyOptions(path)).train()
    policy.share_prefixes()
    ids, lengths, mask = sample_trees(shape)
    tokens = {"separate": int(lengths.sum()), "shared": 0}

    def step(rows: Any, packing: Any) -> float:
        width = int(lengths[rows].max())
        scored = policy.score(ids[rows, :width], lengths[rows], mask=mask[rows, :width], packing=packing)
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
            total += step(rows, pack_tree(ids[rows], lengths[rows], pack))
        return total

    seconds: dict[str, list[float]] = {"separate": [], "shared": []}
    losses = {}
    for turn in range(rounds + 1):
        for name, run in (("separate", separate), ("shared", shared)):
            policy.zero_grad()
            began = time.perf_counter()
            losses[name] = run()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
    assert abs(losses["separate"] - losses["shared"]) < 1e-4, losses
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
        rows = compare_vocabulary(size, options.lengths, options.chunk, options.rounds)
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
        row = compare_prefixes(shape, budget=options.budget, rounds=options.rounds)
        prefixes.append(row)
        speeds = f"{row['separate_tokens_per_second']:12,.0f}{row['shared_tokens_per_second']:12,.0f}"
        print(f"{row['shape']:34}{speeds}{row['computed_share']:10.2f}{row['ratio']:10.2f}", flush=True)
    figures = {
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "rounds": options.rounds,
        "vocabulary": vocabulary,
        "shared_prefixes": prefixes,
    }
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
