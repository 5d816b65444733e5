"""The policies of the benchmark: Qwen3 of three kinds, with a tokenizer whose format both contestants read.

Two are random, but cannot say EOS: one number of every hidden state is the same everywhere, and EOS dislikes it. So all
responses have the length of the budget. The third speaks in turns: each token is drawn among four that belong to the
place in the turn, and the turn ends with a tool call. Nothing is stubbed: they are checkpoints like any other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from shared import TOOL
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging

EOS, PAD, OPEN, CLOSE = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
TAGS = (f"<{TOOL}>", f"</{TOOL}>", "<result>", "</result>")
PIECES = ("found", "ticket", "user", "assistant")
CHOICES = 4  # equally likely tokens at each place of a turn
NUM_PROMPTS = 512
PROMPT_WORDS = 8

# A tool's result follows the call at once: the assistant's turn goes on, as in the paper's format.
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'tool' %}{{- '<result>' + message['content'] + '</result>' }}"
    "{%- else %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{%- if message.get('tool_calls') %}{%- for call in message['tool_calls'] %}"
    "{{- '<' + call['function']['name'] + '>' }}"
    "{%- for key, value in call['function']['arguments'].items() %}{{- key + ' ' + value }}{%- endfor %}"
    "{{- '</' + call['function']['name'] + '>' }}{%- endfor %}"
    "{%- else %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt and messages[-1]['role'] != 'tool' %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# How transformers, and TRL with it, reads the same format.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<|im_start|>assistant\n", "</result>"],
    "fields": {
        "tool_calls": {
            "open": f"<{TOOL}>ticket",
            "close": f"</{TOOL}>",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": TOOL, "arguments": {"ticket": "{content}"}}},
        },
        "content": {"content": "text"},
    },
}


@dataclass(frozen=True)
class Shape:
    """Size of a policy."""

    hidden: int
    intermediate: int
    layers: int
    words: int  # of the vocabulary


SHAPES = {
    "tools": Shape(hidden=128, intermediate=160, layers=2, words=128),
    "large": Shape(hidden=512, intermediate=1536, layers=8, words=8192),
    "tiny": Shape(hidden=128, intermediate=160, layers=2, words=128),
}


def build_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: `` w0`` to ``w<words - 1>`` and the tags are single tokens, the rest is bytes."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *PIECES, *(f"\u0120w{n}" for n in range(words))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?[A-Za-z]+[0-9]*|\s|[^\sA-Za-z]+"), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in (EOS, PAD, OPEN, CLOSE)])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in TAGS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    wrapped.response_template = RESPONSE_TEMPLATE
    return wrapped


def build_policy(shape: Shape, tokenizer: PreTrainedTokenizerFast, *, turn_tokens: int) -> Qwen3ForCausalLM:
    """Random weights under which EOS cannot be sampled; turns of ``turn_tokens`` tokens, 0 for none."""
    heads = shape.hidden // 32
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = Qwen3ForCausalLM(config).float()
        if turn_tokens:
            _speak_in_turns(policy, tokenizer, turn_tokens)
        else:
            _never_say(policy, list(tokenizer.get_added_vocab().values()))
    policy.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return policy


@torch.no_grad()
def _never_say(policy: Qwen3ForCausalLM, tokens: list[int]) -> None:
    """Their logits lie far below all others: the first number of a hidden state is positive and nothing changes it."""
    policy.model.embed_tokens.weight[:, 0] = 0.1
    for layer in policy.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    policy.lm_head.weight[:, 0] = 0.0
    policy.lm_head.weight[tokens] = 0.0
    policy.lm_head.weight[tokens, 0] = -100.0


@torch.no_grad()
def _speak_in_turns(policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, turn_tokens: int) -> None:
    """A token depends on the one before it alone, and the words of each place of a turn occur nowhere else."""
    for layer in policy.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    embedding = torch.randn(policy.lm_head.weight.shape)
    embedding /= embedding.square().mean(-1, keepdim=True).sqrt()
    policy.model.embed_tokens.weight.copy_(embedding)
    policy.lm_head.weight.zero_()
    before = _ids(tokenizer, "\n") + _ids(tokenizer, "</result>")
    for place in turn_places(tokenizer, turn_tokens):
        policy.lm_head.weight[place] = embedding[before].sum(0)
        before = place


def turn_places(tokenizer: PreTrainedTokenizerFast, turn_tokens: int) -> list[list[int]]:
    """The tokens that may stand at each place of a turn: words, then a call with a word as its argument."""
    call = [_ids(tokenizer, f"<{TOOL}>"), _ids(tokenizer, "ticket"), None, _ids(tokenizer, f"</{TOOL}>")]
    places = [None] * (turn_tokens - len(call)) + call
    words = iter(range(CHOICES * turn_tokens))
    return [
        [token for _ in range(CHOICES) for token in _ids(tokenizer, f" w{next(words)}")] if place is None else place
        for place in places
    ]


def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 1, f"{text!r} should be one token, is {ids}"
    return ids


def write_prompts(path: Path) -> None:
    """Prompts of one length, all different."""
    with path.open("w") as file:
        for number in range(NUM_PROMPTS):
            words = (f"w{(number * 5 + place * place * (number % 7 + 1)) % 128}" for place in range(PROMPT_WORDS))
            file.write(json.dumps({"question": " " + " ".join(words), "answer": "-"}) + "\n")


def save(folder: Path, case: str, *, turn_tokens: int) -> int:
    """Write checkpoint, tokenizer and prompts of a case; returns the number of parameters."""
    tokenizer = build_tokenizer(SHAPES[case].words)
    transformers_logging.disable_progress_bar()
    policy = build_policy(SHAPES[case], tokenizer, turn_tokens=turn_tokens)
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_prompts(folder / "prompts.jsonl")
    return policy.num_parameters()
