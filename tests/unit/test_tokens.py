"""Claims about token ids and text: what is measured once with the tokenizer's own functions holds for the short way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from appo_lightning.tasks.lookup.tokenizer import build_tokenizer as build_lookup_tokenizer
from appo_lightning.tokens import Decoder, decode_tokens, encode_pieces, encode_text, is_thread_safe
from helpers.scripted import scripted_tokenizer
from helpers.tiny import EOS, build_tokenizer


class Slow:
    """A tokenizer written in Python: no backend, only transformers' interface."""

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self._inner = inner

    def encode(self, text: str, **options: object) -> list[int]:
        return self._inner.encode(text, **options)

    def decode(self, ids: list[int], **options: object) -> str:
        return str(self._inner.decode(ids, **options))


@pytest.mark.parametrize("make", [scripted_tokenizer, build_lookup_tokenizer, lambda: Slow(scripted_tokenizer())])
def test_short_and_long_way_agree(make):
    tokenizer = make()

    @given(st.text(max_size=40))
    def agree(text: str) -> None:
        text += f"</search>\n{EOS}"
        ids = encode_text(tokenizer, text)
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        assert decode_tokens(tokenizer, ids) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert decode_tokens(tokenizer, ids, skip_special=True) == tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    agree()


def one_that_strips_its_first_space() -> PreTrainedTokenizerFast:
    words = {"\u2581a": 0, "\u2581b": 1, "c": 2, "</s>": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="c"))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize("skip_special", [False, True])
@pytest.mark.parametrize(
    "make",
    [scripted_tokenizer, build_lookup_tokenizer, one_that_strips_its_first_space, lambda: Slow(scripted_tokenizer())],
)
def test_texts_of_tokens_join_to_the_text_of_all(make, skip_special):
    tokenizer = make()
    decode = Decoder(tokenizer, skip_special=skip_special)
    # Any ids: single bytes of the vocabulary make whole characters, halves of some, and nonsense; 9999 is no token.
    token = st.integers(0, 3 if make is one_that_strips_its_first_space else 400) | st.just(9999)

    @given(st.lists(token, max_size=20))
    def agree(ids: list[int]) -> None:
        assert decode(ids) == decode_tokens(tokenizer, ids, skip_special=skip_special)

    agree()
    assert decode([]) == ""


@pytest.mark.parametrize("text", ["\ufffd", "a\ufffdb", "東京 𝄞 é"])
def test_characters_of_several_tokens_are_decoded_whole(text):
    tokenizer = scripted_tokenizer()
    assert Decoder(tokenizer)(encode_text(tokenizer, text)) == text


def test_threads_share_a_tokenizer_only_where_its_backend_does_the_work():
    tokenizer = build_tokenizer()
    assert is_thread_safe(tokenizer)
    assert not is_thread_safe(Slow(tokenizer))
    tokenizer("the quick", truncation=True, max_length=2)  # from here on transformers sets it up around each call
    assert not is_thread_safe(tokenizer)


def test_spaces_before_signs_are_not_tidied_up():
    tokenizer = build_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    text = "x = 3 , y ! don 't"
    assert decode_tokens(tokenizer, encode_text(tokenizer, text)) == text
    assert decode_tokens(Slow(tokenizer), encode_text(tokenizer, text)) == text


def test_truncation_that_somebody_left_on_does_not_cut():
    tokenizer = build_tokenizer()
    whole = encode_text(tokenizer, "the quick brown fox " * 10)
    tokenizer("the quick", truncation=True, max_length=2)  # the backend keeps this setting
    assert encode_text(tokenizer, "the quick brown fox " * 10) == whole


def test_nothing_is_nothing():
    assert decode_tokens(build_tokenizer(), []) == ""
    assert encode_text(build_tokenizer(), "") == []


@given(st.lists(st.sampled_from([">", "\n", "]", "</", EOS, "é", "東京", " "]) | st.text(max_size=5), max_size=8))
def test_pieces_are_encoded_as_the_whole_that_they_are(pieces):
    tokenizer = scripted_tokenizer()
    encoded = encode_pieces(tokenizer, pieces)
    assert len(encoded) == len(pieces)
    assert [token for piece in encoded for token in piece] == encode_text(tokenizer, "".join(pieces))
    apart = encode_pieces(Slow(tokenizer), pieces)
    assert apart == [encode_text(tokenizer, piece) for piece in pieces]


def test_a_token_across_two_pieces_belongs_to_the_first():
    tokenizer = scripted_tokenizer()
    (merged,) = encode_text(tokenizer, "</")
    assert encode_pieces(tokenizer, ["a<", "/", "b"]) == [
        [*encode_text(tokenizer, "a"), merged],
        [],
        encode_text(tokenizer, "b"),
    ]
