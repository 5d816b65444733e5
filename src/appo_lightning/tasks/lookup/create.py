"""Create the tiny policy of the quick start: a Qwen3 of a few hundred thousand parameters, from scratch.

``python -m appo_lightning.tasks.lookup.create --output DIR`` writes an ordinary transformers checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from appo_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import Qwen3Config, Qwen3ForCausalLM

HEAD_DIM = 32  # the smallest that vLLM's attention kernels accept


def tiny_config(vocabulary_size: int, *, hidden_size: int, num_layers: int, max_length: int) -> Qwen3Config:
    """The Qwen3 configuration of the tiny policy."""
    from transformers import Qwen3Config

    if hidden_size < HEAD_DIM or hidden_size % HEAD_DIM:
        raise ConfigurationError(f"hidden_size must be a multiple of {HEAD_DIM}, got {hidden_size}")
    if num_layers < 1:
        raise ConfigurationError(f"num_layers must be at least 1, got {num_layers}")
    heads = hidden_size // HEAD_DIM
    return Qwen3Config(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_length,
        # Rotations fast enough to tell the neighbours of a token apart in sequences of a hundred tokens.
        rope_parameters={"rope_type": "default", "rope_theta": 1_000.0},
        tie_word_embeddings=True,
        dtype="float32",
    )


def _prepare_attention(model: Qwen3ForCausalLM) -> None:
    """Start every attention layer as a copier: what a token attends to, it takes over.

    ``W_o W_v = I / 16``, one half of mimetic initialisation (Trockman and Kolter 2023, arXiv 2305.09828) with the sign
    that serves copying. A small transformer otherwise needs long to discover that it can copy from its context, which
    is most of what this world asks.
    """
    import torch

    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            torch.nn.init.orthogonal_(attention.v_proj.weight, gain=0.25)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)


def create_tiny_policy(
    directory: str | Path,
    seed: int = 0,
    *,
    hidden_size: int = 128,
    num_layers: int = 2,
    function_calls: bool = False,
) -> Path:
    """Write an untrained policy for the embedded world: config, weights, tokenizer and generation settings.

    The directory loads with ``AutoModelForCausalLM`` and ``AutoTokenizer``. The same arguments write the same weights.

    Args:
        directory: created if missing.
        seed: of the weights; the global random state is left as it was.
        hidden_size: width, a multiple of 32.
        num_layers: decoder layers.
        function_calls: give the tokenizer a chat template for JSON function calls.

    Returns:
        The directory.

    Raises:
        ConfigurationError: an impossible size, or the directory holds other files.
    """
    import torch
    from transformers import GenerationConfig, Qwen3ForCausalLM
    from transformers.utils import logging as transformers_logging

    from appo_lightning.tasks.lookup.tokenizer import MAX_LENGTH, build_tokenizer

    path = Path(directory)
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").is_file())):
        raise ConfigurationError(f"{path} exists and is no checkpoint: name another directory")
    tokenizer = build_tokenizer(function_calls=function_calls)
    config = tiny_config(len(tokenizer), hidden_size=hidden_size, num_layers=num_layers, max_length=MAX_LENGTH)
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
        _prepare_attention(model)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers_logging.disable_progress_bar()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m appo_lightning.tasks.lookup.create``."""
    from transformers.utils import logging as transformers_logging

    parser = argparse.ArgumentParser(description="Create the tiny policy of the quick start, untrained.")
    parser.add_argument("--output", required=True, help="directory of the new checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    parser.add_argument("--hidden-size", type=int, default=128, help="width, a multiple of 32 (default 128)")
    parser.add_argument("--num-layers", type=int, default=2, help="decoder layers (default 2)")
    parser.add_argument(
        "--function-calls",
        action="store_true",
        help="for JSON function calls: configs/quickstart/function_calls_sft.yaml",
    )
    options = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()
    path = create_tiny_policy(
        options.output,
        options.seed,
        hidden_size=options.hidden_size,
        num_layers=options.num_layers,
        function_calls=options.function_calls,
    )
    overlay = " --config configs/quickstart/function_calls_sft.yaml" if options.function_calls else ""
    print(f"Wrote an untrained policy to {path}. Next: appo fit --config configs/quickstart/sft.yaml{overlay}")


if __name__ == "__main__":
    main()
