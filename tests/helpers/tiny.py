"""A policy of a few hundred kilobytes with a real tokenizer, built in a second and saved as a checkpoint."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

EOS = "<|im_end|>"
# Repeated tags make the trainer merge across their ends: `>\n` and `</` become single tokens.
CORPUS = [
    "<think> add the two numbers </think>\n<python>\nprint(3 + 4)\n</python>\n<result>\n7\n</result>\n",
    "<think> that is all </think>\n<answer>7</answer>\n",
    "<think> look it up </think>\n<search>population of the city</search>\n<result>\n42 people\n</result>\n",
    "The quick brown fox jumps over the lazy dog, naïve café, 東京.\n",
]


def build_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on ``CORPUS``; always the same for the same size."""
    tokenizer = Tokenizer(models.BPE())
    # Without the usual regular expression a token may hold punctuation and a line break together.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=4,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token="<|endoftext|>")


def build_policy(
    vocab_size: int, *, tied: bool = True, seed: int = 0, scale: float = 0.2, max_length: int = 1024
) -> PreTrainedModel:
    """A random Qwen3 of about 0.1 million parameters; ``scale`` makes its distribution far from uniform."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=max_length,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = Qwen3ForCausalLM(config).float().eval()
    perturb(policy, seed=seed + 1, scale=scale)
    return policy


@torch.no_grad()
def perturb(policy: torch.nn.Module, *, seed: int, scale: float = 0.05) -> None:
    """Add noise to every parameter that can be trained, as an optimiser step would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.add_(noise.to(parameter.device))


def save_tiny(
    directory: Path, *, tied: bool = True, seed: int = 0, max_length: int = 1024, vocab_size: int = 320
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Write a checkpoint with its tokenizer to ``directory`` and return both."""
    tokenizer = build_tokenizer(vocab_size)
    policy = build_policy(len(tokenizer), tied=tied, seed=seed, max_length=max_length)
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return policy, tokenizer


@torch.no_grad()
def script(policy: PreTrainedModel, token_ids: list[int]) -> None:
    """Make an untied policy say one token after the other of ``token_ids``, with probability close to 1."""
    successor = dict(itertools.pairwise(token_ids))
    assert len(successor) == len(token_ids) - 1, "each token needs one successor: the script repeats a token"
    parameters = dict(policy.named_parameters())
    for name, parameter in parameters.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            parameter.zero_()  # the hidden state is then the embedding of the last token
        elif name.endswith("norm.weight"):
            parameter.fill_(1.0)
    embedding = parameters["model.embed_tokens.weight"]
    embedding.copy_(torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)))
    for token, following in successor.items():
        parameters["lm_head.weight"][following] += embedding[token]
