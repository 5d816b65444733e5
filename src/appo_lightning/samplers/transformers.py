"""The rollout engine that needs nothing but PyTorch and transformers: the parity twin of the vLLM sampler."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from appo_lightning.errors import ConfigurationError, SamplerError
from appo_lightning.samplers._common import (
    StopStrings,
    check_request,
    checked_weights,
    find_eos_token_ids,
    finish_reason,
    ordinary_tensors,
    parameter_shapes,
    preserved_rng,
)
from appo_lightning.samplers.base import Completion, Precision, Sampler, SampleRequest, SamplerStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TransformersSampler(Sampler):
    """Samples with ``transformers`` alone: for tests, for machines without vLLM, and to check vLLM against.

    One ``step`` takes the waiting requests, ``max_batch_size`` at most, and completes them as one batch: a request
    submitted later waits for the next step. A response depends on weights, token_ids and seed only, up to the rounding
    of batched matrix products.

    Args:
        dtype: of the weights; ``"auto"`` keeps the checkpoint's.
        device: ``"auto"`` is CUDA where there is one, else the CPU.
        max_batch_size: requests generated side by side; bounds the memory of the key-value cache.
    """

    def __init__(
        self,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        device: str = "auto",
        max_batch_size: int = 64,
    ) -> None:
        if max_batch_size < 1:
            raise SamplerError(f"max_batch_size must be at least 1, got {max_batch_size}")
        if device != "auto":
            _check_device(device)
        self.dtype = dtype
        self.device = device
        self.max_batch_size = max_batch_size
        self._model: PreTrainedModel | None = None
        self._waiting: dict[int, SampleRequest] = {}
        self._stops: dict[tuple[str, ...], StopStrings] = {}
        self._stats = SamplerStats()

    def start(self, checkpoint: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        from transformers import AutoModelForCausalLM

        if self._model is not None:
            raise SamplerError("the sampler is already started: close it first")
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with ordinary_tensors(), preserved_rng():
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=self.dtype)
            torch.nn.Module.to(model, device)
        self._model = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._vocab_size = int(model.config.get_text_config().vocab_size)
        self._eos_token_ids = find_eos_token_ids(checkpoint, tokenizer)
        self._stats = SamplerStats()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        model = self._started()
        if self._waiting:
            raise SamplerError(f"{len(self._waiting)} requests are unfinished: step until done, or abort them")
        parameters = dict(model.named_parameters())
        with ordinary_tensors():
            for name, tensor in checked_weights(weights, *parameter_shapes(model)):
                parameters[name].copy_(tensor)

    def read_weights(self, columns: Mapping[str, Sequence[int]]) -> dict[str, list[torch.Tensor]]:
        parameters = dict(self._started().named_parameters())
        return {
            name: [parameters[name] if parameters[name].dim() == 1 else parameters[name][:, list(chosen)]]
            for name, chosen in columns.items()
            if name in parameters
        }

    @property
    def precision(self) -> Precision:
        return "float32" if self._started().dtype == torch.float32 else "half"

    def submit(self, request: SampleRequest) -> None:
        self._started()
        check_request(request, max_length=self._max_length, vocab_size=self._vocab_size, unfinished=self._waiting)
        self._waiting[request.id] = request

    def step(self) -> list[Completion]:
        model = self._started()
        requests = list(self._waiting.values())[: self.max_batch_size]
        if not requests:
            return []
        began = time.perf_counter()
        completions = self._complete(model, requests)
        for completion in completions:
            del self._waiting[completion.id]
        self._stats.steps += 1
        self._stats.seconds += time.perf_counter() - began
        self._stats.prompt_tokens += sum(len(request.token_ids) for request in requests)
        self._stats.generated_tokens += sum(len(completion.token_ids) for completion in completions)
        return completions

    def abort(self, ids: Sequence[int]) -> None:
        for i in ids:
            self._waiting.pop(i, None)

    @property
    def num_slots(self) -> int:
        return self.max_batch_size

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting)

    @property
    def progress(self) -> int:
        return self._stats.steps  # each samples a token

    def stats(self) -> SamplerStats:
        return replace(self._stats)

    def close(self) -> None:
        self._model = None
        self._waiting.clear()
        self._stops.clear()

    def _started(self) -> PreTrainedModel:
        if self._model is None:
            raise SamplerError("the sampler is not started: call start first")
        return self._model

    @torch.inference_mode()
    def _complete(self, model: PreTrainedModel, requests: list[SampleRequest]) -> list[Completion]:
        from transformers import DynamicCache

        rows = [_Row(request, self._stop_strings(request.stop)) for request in requests]
        settings = _Settings.of(requests, model.device)
        input_ids, attention_mask = _left_padded([request.token_ids for request in requests], model.device)
        # Padding must not shift positions: each row counts from its own first token.
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        unfinished = list(rows)
        for step in range(settings.uniforms.shape[1]):
            logits = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            logprobs = processed_logprobs(logits, settings.temperature, settings.top_p, settings.top_k, settings.min_p)
            tokens = _draw(logprobs, settings.uniforms[:, step], greedy=settings.temperature == 0)
            chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
            for row, token, logprob in zip(unfinished, tokens.tolist(), chosen.tolist(), strict=True):
                row.append(token, logprob, self._eos_token_ids)
            kept = [i for i, row in enumerate(unfinished) if row.finish is None]
            if not kept:
                break
            input_ids, position_ids = tokens[:, None], position_ids[:, -1:] + 1
            if len(kept) < len(unfinished):
                # Finished rows leave at once: they cost time, and their positions would run past the model's limit.
                index = torch.tensor(kept, device=model.device)
                input_ids, position_ids, attention_mask = input_ids[index], position_ids[index], attention_mask[index]
                settings = settings.select(index)
                cache.batch_select_indices(index)
                unfinished = [unfinished[i] for i in kept]
            attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
        return [row.completion() for row in rows]

    def _stop_strings(self, stop: tuple[str, ...]) -> StopStrings | None:
        if not stop:
            return None
        if stop not in self._stops:
            self._stops[stop] = StopStrings(self._tokenizer, stop)
        return self._stops[stop]


def _check_device(name: str) -> None:
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ConfigurationError(f"device must be 'auto' or a torch device such as 'cuda:1', got {name!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"device is {name!r}, but torch finds no CUDA device; use 'cpu' or 'auto'")


@dataclass(slots=True)
class _Row:
    request: SampleRequest
    stop: StopStrings | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Literal["stop", "eos", "length"] | None = None

    def append(self, token: int, logprob: float, eos_token_ids: frozenset[int]) -> None:
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        completed = self.stop.completed_by_last(self.token_ids) if self.stop else None
        if completed or token in eos_token_ids or len(self.token_ids) == self.request.max_tokens:
            self.finish = finish_reason(token, completed, eos_token_ids)

    def completion(self) -> Completion:
        assert self.finish is not None
        return Completion(self.request.id, self.token_ids, self.logprobs, self.finish)


@dataclass(slots=True)
class _Settings:
    temperature: torch.Tensor  # [B]; 0 = greedy
    top_p: torch.Tensor  # [B]
    top_k: torch.Tensor  # [B]; 0 = off
    min_p: torch.Tensor  # [B]; 0 = off
    uniforms: torch.Tensor  # [B, T] float64 in [0, 1)

    @classmethod
    def of(cls, requests: Sequence[SampleRequest], device: torch.device) -> _Settings:
        # Greedy means the most likely token and its log-prob at temperature 1: truncation would only hide that number.
        uniforms = torch.nn.utils.rnn.pad_sequence([_uniforms(request) for request in requests], batch_first=True)
        return cls(
            torch.tensor([request.temperature for request in requests], device=device),
            torch.tensor([request.top_p if request.temperature else 1.0 for request in requests], device=device),
            torch.tensor([request.top_k if request.temperature else 0 for request in requests], device=device),
            torch.tensor([request.min_p if request.temperature else 0.0 for request in requests], device=device),
            uniforms.to(device),
        )

    def select(self, index: torch.Tensor) -> _Settings:
        return _Settings(
            self.temperature[index], self.top_p[index], self.top_k[index], self.min_p[index], self.uniforms[index]
        )


def _uniforms(request: SampleRequest) -> torch.Tensor:
    # One number per token from the request's own generator, always made on the CPU: neither the other rows of the
    # batch, nor the device, nor torch's global state can change what this request samples.
    generator = torch.Generator().manual_seed(request.seed)
    return torch.rand(request.max_tokens, generator=generator, dtype=torch.float64)


def _left_padded(sequences: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(sequence)) + sequence for sequence in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(sequence)) + [1] * len(sequence) for sequence in sequences], device=device)
    return ids, mask


def _draw(logprobs: torch.Tensor, uniforms: torch.Tensor, *, greedy: torch.Tensor) -> torch.Tensor:
    # Inverting the distribution function takes one random number per token; float64 keeps the tail of a large
    # vocabulary reachable and rounding from favouring any token.
    cumulative = logprobs.double().exp().cumsum(-1)
    total = cumulative[:, -1]
    # Strictly below the total, so that no token of probability 0 behind the last possible one is drawn.
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    sampled = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return torch.where(greedy, logprobs.argmax(-1), sampled)


def processed_logprobs(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-probs of the distribution that is really sampled from.

    log_softmax(logits / temperature), restricted to tokens at least min_p times as likely as the most likely one and to
    the top_k most likely tokens, renormalised, restricted to the smallest set of most likely tokens that holds at least
    top_p, and renormalised again.

    Args:
        logits: [B, V].
        temperature: [B]; 0 counts as 1.
        top_p: [B] in (0, 1].
        top_k: [B]; 0 = off.
        min_p: [B] in [0, 1]; 0 = off. None: off for all.

    Returns:
        [B, V] float32 nats; -inf outside the restriction.
    """
    logprobs = (logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None]).log_softmax(-1)
    if min_p is not None and bool((min_p > 0).any()):
        floor = logprobs.max(-1, keepdim=True).values + min_p.log()[:, None]
        logprobs = logprobs.masked_fill(logprobs < floor, -torch.inf).log_softmax(-1)
    if not bool(((top_p < 1) | (top_k > 0)).any()):
        return logprobs
    ordered, order = logprobs.sort(dim=-1, descending=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    in_top_k = (rank < top_k[:, None]) | (top_k == 0)[:, None]
    probs = ordered.masked_fill(~in_top_k, -torch.inf).double().softmax(-1)
    in_top_p = (probs.cumsum(-1) - probs < top_p[:, None]) | (top_p >= 1)[:, None]
    outside = torch.ones_like(logprobs, dtype=torch.bool).scatter(-1, order, ~(in_top_k & in_top_p))
    return logprobs.masked_fill(outside, -torch.inf).log_softmax(-1)
