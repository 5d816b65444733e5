"""Token ids to text and back, exactly: nothing is added, dropped or tidied up.

The tool loop does this several times per turn, between two steps of the engine. transformers' own ``encode`` and
``decode`` set up padding, truncation and a batch around each call, which costs two to three times the work itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, without the special tokens that begin or end a sequence."""
    backend = _unlimited_backend(tokenizer)
    if backend is not None:
        return backend.encode(text, add_special_tokens=False).ids
    return list(tokenizer.encode(text, add_special_tokens=False))


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[str]) -> list[list[int]]:
    """Token ids of a text that is given in pieces and encoded as a whole.

    A token that lies across two pieces belongs to the one in which it begins. A tokenizer written in Python gives no
    offsets: each piece is then encoded alone.
    """
    backend = _unlimited_backend(tokenizer)
    if backend is None:
        return [encode_text(tokenizer, piece) for piece in pieces]
    encoded = backend.encode("".join(pieces), add_special_tokens=False)
    starts = list(accumulate((len(piece) for piece in pieces[:-1]), initial=0))
    ids: list[list[int]] = [[] for _ in pieces]
    reached = 0
    for token, (start, _) in zip(encoded.ids, encoded.offsets, strict=True):
        # Offsets may leave out a space in front; order is what counts.
        reached = max(reached, bisect_right(starts, start) - 1)
        ids[reached].append(token)
    return ids


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """Text of token ids.

    Args:
        tokenizer: the policy's.
        ids: any.
        skip_special: leave special tokens out.
    """
    if not ids:
        return ""
    backend = _backend(tokenizer)
    if backend is not None:
        return backend.decode(ids, skip_special_tokens=skip_special)
    text = tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class Decoder:
    """``decode_tokens`` for one tokenizer, remembering the texts of its tokens.

    A byte-level decoder (that of GPT-2, Llama 3, Qwen) joins the bytes of tokens and does nothing else; tokens that
    hold whole characters can then be joined as text, at a third of the cost. Where one holds a part of a character, or
    the decoder is of another kind, the tokenizer decodes.

    Args:
        tokenizer: the policy's.
        skip_special: leave special tokens out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special: bool = False) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._texts = _TokenTexts(self._decode) if _joins_bytes(tokenizer) else None

    def __call__(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        if self._texts is None:
            return self._decode(ids)
        text = "".join(map(self._texts.__getitem__, ids))
        return self._decode(ids) if "\ufffd" in text else text

    def _decode(self, ids: Sequence[int]) -> str:
        return decode_tokens(self._tokenizer, ids, skip_special=self._skip_special)


class _TokenTexts(dict[int, str]):
    """Texts of tokens by their ids, each looked up once."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode

    def __missing__(self, token: int) -> str:
        text = self[token] = self._decode([token])
        return text


def _joins_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    from tokenizers.decoders import ByteLevel

    backend = _backend(tokenizer)
    return backend is not None and isinstance(backend.decoder, ByteLevel)


def is_thread_safe(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether several threads may use ``encode_text`` and ``decode_tokens`` at once."""
    return _unlimited_backend(tokenizer) is not None


def _unlimited_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The same, but None if an earlier caller has left truncation or padding switched on in there."""
    backend = _backend(tokenizer)
    return None if backend is None or backend.truncation is not None or backend.padding is not None else backend


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The ``tokenizers.Tokenizer`` underneath; None: this one is written in Python."""
    return getattr(tokenizer, "backend_tokenizer", None)
