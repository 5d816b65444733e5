"""Text that others wrote, as tokens that cannot act: no control tag, no special token."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from appo_lightning.tokens import Decoder, encode_text, is_thread_safe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_CHARS_PER_TOKEN = 64  # text beyond it is not even tokenised: a tool may answer with megabytes
_KEPT_TEXTS = 256  # rollouts of one prompt often get the same answers


class PlainText:
    """Encodes text so that nothing inside it acts as a control tag or a special token.

    Args:
        tokenizer: the policy's tokenizer.
        tags: names of the control tags.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tags: Iterable[str]) -> None:
        self._tokenizer, self._decode = tokenizer, Decoder(tokenizer)
        # Some vocabularies add runs of spaces as tokens: they control nothing.
        added = {text: token for text, token in tokenizer.get_added_vocab().items() if text.strip()}
        self.control_ids = frozenset(added.values()) | frozenset(tokenizer.all_special_ids)
        texts = {mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")} | set(added)
        self._control_text = re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))
        self._encode_whole = functools.lru_cache(_KEPT_TEXTS)(self._encode_anew)

    def defuse(self, text: str) -> str:
        """The text with a space inside everything that looks like a control tag or special token."""
        for _ in range(8):  # breaking one mark can only form another from what the vocabulary makes of spaces
            if not self._control_text.search(text):
                break
            text = self._control_text.sub(lambda match: _broken(match.group()), text)
        return text

    def encode_plain(self, text: str, max_tokens: int) -> tuple[list[int], str]:
        """Token ids of a text, and the text that they show.

        Args:
            text: any.
            max_tokens: the rest is cut.
        """
        whole, shown = self._encode_whole(text[: _MAX_CHARS_PER_TOKEN * max_tokens])
        if len(whole) <= max_tokens:
            return list(whole), shown
        ids = self._cut(whole, max_tokens)
        return ids, self._decode(ids)

    def prepare(self, text: str, max_tokens: int) -> None:
        """Encode a text ahead, in any thread; the next ``encode_plain`` finds it done."""
        if is_thread_safe(self._tokenizer):
            self._encode_whole(text[: _MAX_CHARS_PER_TOKEN * max_tokens])

    def _encode_anew(self, text: str) -> tuple[tuple[int, ...], str]:
        text = valid_text(text)
        # A tokenizer that normalises text may still fold something into a control token, or its neighbours into a tag.
        for _ in range(8):
            ids = encode_text(self._tokenizer, self.defuse(text))
            ids = [token for token in ids if token not in self.control_ids]
            text = self._decode(ids)
            if not self._control_text.search(text):
                return tuple(ids), text
        return (), ""

    def _cut(self, ids: tuple[int, ...], length: int) -> list[int]:
        """The first tokens, without the beginning of a character (at most three bytes) that the cut left behind."""
        for stop in range(length, max(length - 4, 0), -1):
            if not self._decode(ids[:stop]).endswith("\ufffd"):
                return list(ids[:stop])
        return list(ids[:length])


def valid_text(text: str) -> str:
    """The text without halves of surrogate pairs, which can be neither tokenised nor written to a file."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _broken(mark: str) -> str:
    return f"{mark[0]} {mark[1:]}" if len(mark) > 1 else " "
