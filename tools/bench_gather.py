"""Measure how much memory it takes to gather sharded weights for the sampler: tensor by tensor, by layers, at once.

    python tools/bench_gather.py --json runs/bench_gather.json

Two processes share a random policy under FSDP2 on the CPU (gloo), and gather it as for a push. Each way runs in
processes of its own; its memory is the high-water mark of the resident set (VmHWM of /proc/self/status, Linux) over the
resident set just before, so shards and libraries are not in it. Figures are those of rank 0.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarking import write_figures

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
MEGABYTE = 1 << 20


def save_policy(directory: Path, vocabulary: int) -> str:
    """A random policy of 8 layers of 27 MB, and an embedding."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from helpers.tiny import build_tokenizer

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=vocabulary, **sizes, **heads, tie_word_embeddings=True)).save_pretrained(
        directory
    )
    build_tokenizer().save_pretrained(directory)
    return str(directory)


def tensor_by_tensor(policy: Any) -> None:
    """What the package does."""
    for _ in policy.named_weights():
        pass


def layer_by_layer(policy: Any) -> None:
    """FSDP2's own units: each is gathered, copied out (its storage is freed with it), and given back."""
    policy.release_gathered()
    for unit in [*policy.decoder_layers, policy]:
        unit.unshard()
        for parameter in unit.parameters():
            if not hasattr(parameter, "full_tensor"):  # a parameter of another unit
                parameter.detach().clone()
        unit.reshard()


def all_at_once(policy: Any) -> None:
    """A whole copy on every rank."""
    weights = dict(policy.named_weights())
    assert weights


WAYS = {"tensor by tensor": tensor_by_tensor, "layer by layer": layer_by_layer, "all at once": all_at_once}


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def measure(checkpoint: str, way: str) -> dict[str, float]:
    """One rank: peak megabytes, and seconds; also the sizes of what is gathered."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh

    from appo_lightning.policy.causal_lm import CausalPolicy
    from appo_lightning.policy.options import PolicyOptions
    from appo_lightning.policy.parallelize import shard_policy

    torch.distributed.init_process_group("gloo", rank=int(os.environ["LOCAL_RANK"]), world_size=2)
    policy = CausalPolicy(PolicyOptions(checkpoint))
    sizes = [parameter.numel() * 4 / MEGABYTE for parameter in policy.parameters()]
    shard_policy(policy, init_device_mesh("cpu", (2,)))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory that the C library kept would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _resident("VmRSS"), time.perf_counter()
    WAYS[way](policy)
    figures = {"peak": _resident("VmHWM") - before, "seconds": time.perf_counter() - began}
    torch.distributed.destroy_process_group()
    return {**figures, "largest": max(sizes), "total": sum(sizes)}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()

    from helpers.ranks import run_ranks

    rows = []
    for vocabulary in options.vocabularies:
        with tempfile.TemporaryDirectory() as directory:
            checkpoint = save_policy(Path(directory), vocabulary)
            rows += [{"vocabulary": vocabulary, "way": way, **run_ranks(measure, checkpoint, way)[0]} for way in WAYS]
    print(f"{'':22}{'all, MB':>10}{'largest, MB':>13}{'peak, MB':>10}{'seconds':>9}")
    for row in rows:
        print(f"{row['way']:22}{row['total']:10.0f}{row['largest']:13.0f}{row['peak']:10.0f}{row['seconds']:9.2f}")
    write_figures(options.json, rows)


if __name__ == "__main__":
    main()
