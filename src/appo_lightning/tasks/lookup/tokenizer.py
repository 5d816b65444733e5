"""The tokenizer of the embedded world: byte-level BPE, so that any text can be encoded and decoded unchanged.

Built like Qwen's, except that digits group by up to three and that every name, number and frequent word of the world is
one token. It is assembled from a fixed list instead of trained: the same vocabulary on every machine.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from appo_lightning.tasks.lookup.vocabulary import FUNCTION_PIECES, FUNCTION_TAGS, TAGS, tokens_in_use

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

# Qwen2.5's, but that a tool is shown by its name and description alone: a policy of this size reads no schemas.
FUNCTION_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system' }}"
    "{%- for tool in tools %}{{- '\\n' + tool.function.name + ' ' + tool.function.description }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- else %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{%- if message.content or not loop.first %}{{- '\\n' }}{%- endif %}"
    '{{- \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def build_tokenizer(*, function_calls: bool = False) -> PreTrainedTokenizerFast:
    """Build the tokenizer.

    Special tokens (dropped by ``skip_special_tokens``) open and close turns; the tags of thoughts, tool calls, results
    and answers are ordinary added tokens, so they stay in decoded text.

    Args:
        function_calls: with the pieces and the chat template of JSON function calls.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    for text in [*tokens_in_use(), *(FUNCTION_PIECES if function_calls else ())]:
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
    tokenizer.add_tokens(
        [
            AddedToken(text, normalized=False, special=False)
            for text in (TAGS + FUNCTION_TAGS if function_calls else TAGS)
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        chat_template=FUNCTION_TEMPLATE if function_calls else CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
    )
