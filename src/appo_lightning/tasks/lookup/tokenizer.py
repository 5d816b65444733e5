"""The tokenizer of the embedded world: byte-level BPE, so that any text can be encoded and decoded unchanged.

Built like Qwen's, except that digits group by up to three and that every name, number and frequent word of the world is
one token. It is assembled from a fixed list instead of trained: the same vocabulary on every machine.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from appo_lightning.tasks.lookup.vocabulary import TAGS, tokens_in_use

MAX_LENGTH = 4096
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
SPECIAL_TOKENS = (PADDING, "<|im_start|>", END_OF_TURN)

# Qwen's pattern with \p{N}{1,3} for \p{N}.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer.

    Special tokens (dropped by ``skip_special_tokens``) open and close turns; the tags of thoughts, tool calls, results
    and answers are ordinary added tokens, so they stay in decoded text.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    for text in tokens_in_use():
        piece = byte_level.pre_tokenize_str(text)[0][0]
        if piece not in vocabulary:
            vocabulary.append(piece)
    # ignore_merges: a word of the vocabulary is one token without merge rules; other text falls back to bytes.
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"), byte_level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
