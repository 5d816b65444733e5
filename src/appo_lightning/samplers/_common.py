"""What every sampler does the same way: check requests, recognise the end of a response, take in weights."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from appo_lightning.errors import SamplerError
from appo_lightning.samplers.base import MAX_TEMPERATURE, MIN_TEMPERATURE, SampleRequest
from appo_lightning.tokens import decode_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_request(request: SampleRequest, *, max_length: int, vocab_size: int, unfinished: Collection[int]) -> None:
    """Refuse a request that no engine could answer as asked.

    Raises:
        SamplerError: the id is taken, a number is out of range, or the request does not fit into ``max_length``.
    """
    length = len(request.token_ids)
    if request.id in unfinished:
        raise SamplerError(f"request id {request.id} is already in use by an unfinished request")
    if length == 0:
        raise SamplerError(f"request {request.id} has no token_ids: give at least one token (BOS) to continue")
    if min(request.token_ids) < 0 or max(request.token_ids) >= vocab_size:
        raise SamplerError(
            f"request {request.id} holds token ids {min(request.token_ids)} to {max(request.token_ids)}, "
            f"the policy knows 0 to {vocab_size - 1}: use the tokenizer that belongs to the policy"
        )
    if request.max_tokens < 1:
        raise SamplerError(f"max_tokens must be at least 1, got {request.max_tokens}")
    if length + request.max_tokens > max_length:
        raise SamplerError(
            f"request {request.id} needs {length} + {request.max_tokens} = {length + request.max_tokens} tokens, "
            f"max_length is {max_length}: ask for at most {max(max_length - length, 0)} tokens or raise max_length"
        )
    if not 0 <= request.seed < 2**63:
        raise SamplerError(f"seed must be in [0, 2**63), got {request.seed}")
    if request.temperature != 0.0 and not MIN_TEMPERATURE <= request.temperature <= MAX_TEMPERATURE:
        raise SamplerError(
            f"temperature must be 0 (greedy) or in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE:g}], got {request.temperature}"
        )
    if not 0.0 < request.top_p <= 1.0:
        raise SamplerError(f"top_p must be in (0, 1], got {request.top_p}")
    if request.top_k < 0:
        raise SamplerError(f"top_k must be 0 (off) or positive, got {request.top_k}")
    if not 0.0 <= request.min_p <= 1.0:
        raise SamplerError(f"min_p must be in [0, 1], got {request.min_p}")
    if "" in request.stop:
        raise SamplerError("a stop string is empty: every response would end before it began")


class StopStrings:
    """Finds the token that completes one of some strings in a response.

    Works on token ids because text cannot be mapped back to them: a token like ``">\\n"`` ends a stop string in its
    middle. Special tokens count as their text. The prompt does not take part: a string must lie in the response.

    Args:
        tokenizer: decodes the response.
        stop: the strings, none of them empty.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        # A token holds at least one byte; one more token in front, because some decoders strip what they start with.
        self._tail = max(len(string.encode()) for string in stop) + 1
        self._may_complete: dict[int, bool] = {}

    def completed_by_last(self, response_ids: Sequence[int]) -> str | None:
        """The string that the last token of ``response_ids`` completes, or None.

        Meant to be asked after every token: a string completed earlier may be reported again.
        """
        last = response_ids[-1]
        possible = self._may_complete.get(last)
        if possible is None:
            possible = self._may_complete[last] = any(_may_end_in(text, self._stop) for text in self._texts_of(last))
        if not possible:  # most tokens end here, without decoding
            return None
        text = self._decode(response_ids[-self._tail :])
        return next((string for string in self._stop if string in text), None)

    def _texts_of(self, token_id: int) -> tuple[str, str]:
        """A token's text at the beginning and behind other tokens: a decoder may strip a leading space."""
        first = self._decode([token_id])
        return first, self._decode([token_id, token_id]).removeprefix(first)

    def _decode(self, ids: Sequence[int]) -> str:
        return decode_tokens(self._tokenizer, ids)


def _may_end_in(text: str, strings: Iterable[str]) -> bool:
    """Whether one of the strings can end inside a token's text, whatever stands before it."""
    for string in strings:
        if string.isascii():
            if string in text or any(string.endswith(text[:stop]) for stop in range(1, len(text) + 1)):
                return True
        elif string[-1] in text or "\ufffd" in text:  # a part of a multi-byte character
            return True
    return False


def finish_reason(
    last_token: int, completed_stop: str | None, eos_token_ids: Collection[int]
) -> Literal["stop", "eos", "length"]:
    """Why a finished response ended; a stop string that is also EOS counts as a stop string."""
    if completed_stop is not None:
        return "stop"
    return "eos" if last_token in eos_token_ids else "length"


def find_eos_token_ids(checkpoint: str, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a response: the tokenizer's EOS and those of the checkpoint's generation config."""
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(checkpoint).eos_token_id
    except OSError:  # no generation_config.json
        configured = None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(i) for i in [tokenizer.eos_token_id, *ids] if i is not None)


def checked_weights(
    weights: Iterable[tuple[str, torch.Tensor]], shapes: Mapping[str, torch.Size], aliases: Collection[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass weights on one by one, refusing what does not fit.

    Args:
        weights: names and full tensors; may be a generator that gathers shards as it goes.
        shapes: every parameter that must arrive.
        aliases: other names of tied parameters; dropped, they would arrive twice.

    Raises:
        SamplerError: a name is unknown, missing or given twice, or a shape differs.
    """
    missing = set(shapes)
    for name, tensor in weights:
        if name in aliases:
            continue
        if name not in shapes:
            raise SamplerError(f"the policy has no parameter {name!r}: pass plain transformers names, LoRA merged")
        if name not in missing:
            raise SamplerError(f"parameter {name!r} was given twice")
        if tensor.shape != shapes[name]:
            raise SamplerError(
                f"parameter {name!r} must have shape {list(shapes[name])}, got {list(tensor.shape)}: "
                "gather sharded tensors (full_tensor) first"
            )
        missing.remove(name)
        yield name, tensor.detach()
    if missing:
        raise SamplerError(f"{len(missing)} parameters did not arrive, {min(missing)!r} among them: pass all of them")


def parameter_shapes(model: torch.nn.Module) -> tuple[dict[str, torch.Size], set[str]]:
    """Shapes of all parameters by name, and the further names of tied ones."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    every_name = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return shapes, every_name - set(shapes)


@contextmanager
def preserved_torch_rng() -> Iterator[None]:
    """Leave torch's random states (CUDA's of the current device too, once it is in use) as they were found."""
    state = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        elif torch.cuda.is_initialized():
            # As if CUDA had only now come into use: its generators start from the seed of the restored state.
            torch.cuda.manual_seed_all(torch.initial_seed())


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave the random states of Python, NumPy and torch as they were found."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with preserved_torch_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make tensors that can be changed later, without gradients, even inside a trainer's ``inference_mode``."""
    with torch.inference_mode(False), torch.no_grad():
        yield
