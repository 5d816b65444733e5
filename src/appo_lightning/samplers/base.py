"""The contract of a rollout engine: token ids in, token ids and their log-probs out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from appo_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Engines clamp or ignore what is colder; the log-probs would then not be those of the temperature asked for.
MIN_TEMPERATURE = 0.01
MAX_TEMPERATURE = 2.0  # vLLM's
Precision = Literal["float32", "tf32", "half"]  # tf32: float32 whose products keep 10 bits, as GPUs multiply


@dataclass(slots=True)
class SampleRequest:
    """Continue ``token_ids``."""

    id: int  # chosen by the caller, unique among unfinished requests
    token_ids: list[int]  # prompt and everything that follows it so far
    max_tokens: int  # at least 1
    seed: int  # the completion is a function of weights, token_ids and seed
    temperature: float = 1.0  # 0.0 = greedy; log-probs are then those of temperature 1
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0  # 0 = off; else tokens at least this many times as likely as the most likely one
    stop: tuple[str, ...] = ()  # generation ends with the token that completes one of these strings


@dataclass(slots=True)
class Completion:
    """The answer to a request."""

    id: int
    token_ids: list[int]  # sampled tokens, the stopping token (EOS too) included
    logprobs: list[float]  # nats; of each sampled token under the distribution it was drawn from
    finish: Literal["stop", "eos", "length"]
    cached_tokens: int = 0  # tokens of the request served from a prefix cache


@dataclass(slots=True)
class SamplerStats:
    """Counters since ``start``."""

    generated_tokens: int = 0  # of completions that were returned
    prompt_tokens: int = 0  # of completions that were returned; cached ones included
    cached_tokens: int = 0  # prompt tokens served from a prefix cache
    steps: int = 0
    seconds: float = 0.0  # wall clock inside ``step``


class Sampler(ABC):
    """A rollout engine that holds its own copy of the policy's weights.

    Lifecycle: ``start`` once, then ``load_weights`` after every change of the policy, ``submit`` and ``step`` until
    ``num_unfinished`` is 0, ``close`` at the end. Between these rounds it may ``sleep`` and ``wake``. Single-threaded:
    the rollout loop owns it.
    """

    provides_logprobs: bool = True  # False: ``Completion.logprobs`` holds zeros; evaluation only

    @property
    def precision(self) -> Precision:
        """The coarsest numbers that its log-probs come from, once started."""
        return "float32"

    @property
    def num_slots(self) -> int | None:
        """Requests generated side by side, at least 1; None: as many as there are."""
        return None

    @property
    def cache_tokens(self) -> int | None:
        """Tokens that the prefix cache holds; None: no bound that matters, or no such cache."""
        return None

    @abstractmethod
    def start(self, checkpoint: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        """Load the policy of a transformers checkpoint directory.

        Args:
            checkpoint: directory or Hub id that ``AutoModelForCausalLM.from_pretrained`` accepts.
            tokenizer: the policy's tokenizer: stop strings and EOS.
            max_length: longest sequence (prompt + response) in tokens.
        """

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights (transformers parameter names, full tensors) and forget cached prefixes.

        Raises:
            SamplerError: requests are unfinished, or a name or shape does not fit.
        """

    def expect_adapter(self, rank: int) -> None:
        """Called before ``start``: weights will come by ``load_adapter``.

        Args:
            rank: of the LoRA update.

        Raises:
            ConfigurationError: the sampler computes with whole weights only (unless it overrides this), or has no room
                for the rank.
        """
        raise self._no_adapters()

    def load_adapter(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the LoRA adapter on top of the checkpoint's weights and forget cached prefixes.

        Args:
            weights: pairs ``<module>.lora_A.weight`` [rank, in] and ``<module>.lora_B.weight`` [out, rank] under
                transformers module names; the update of a module is B @ A, with no further scale.

        Raises:
            ConfigurationError: as ``expect_adapter``.
            SamplerError: requests are unfinished, or the engine cannot adapt a module.
        """
        raise self._no_adapters()

    def _no_adapters(self) -> ConfigurationError:
        return ConfigurationError(
            f"sync.lora: adapter needs a sampler that computes with adapters; {type(self).__name__} does not: use merge"
        )

    def read_weights(self, columns: Mapping[str, Sequence[int]]) -> dict[str, list[torch.Tensor]]:
        """What the engine really computes with: the check after a push.

        Args:
            columns: by name of a weight or adapter as it was pushed, the columns to read.

        Returns:
            For each name, one tensor [rows, columns] per place where the engine holds it, such as embedding and output
            layer; a vector is returned whole. Names that cannot be read are left out: none can, by default.
        """
        return {}

    @contextmanager
    def reading(self, columns: Mapping[str, Sequence[int]]) -> Iterator[dict[str, list[torch.Tensor]]]:
        """``read_weights`` around some sampling, for engines that can do both in one pass over the weights.

        Yields:
            A dictionary that is empty until the end of the block, and then holds what ``read_weights`` returns.
        """
        held: dict[str, list[torch.Tensor]] = {}
        yield held
        held.update(self.read_weights(columns))

    @property
    def cached_tokens(self) -> int:
        """Tokens that a prefix cache would serve now, at least; 0 after a change of weights, or without a cache."""
        return 0

    def sleep(self) -> None:
        """Give memory back while nothing is sampled; without effect by default."""

    def wake(self) -> bool:
        """Take the memory again; without effect when awake.

        Returns:
            Whether the weights are still there. If not, the next call must be ``load_weights``.
        """
        return True

    @abstractmethod
    def submit(self, request: SampleRequest) -> None:
        """Queue a request; it joins the running batch at the next step.

        Raises:
            SamplerError: the request does not fit into ``max_length``.
        """

    @abstractmethod
    def step(self) -> list[Completion]:
        """Advance the running batch and return what finished; empty when nothing did."""

    @abstractmethod
    def abort(self, ids: Sequence[int]) -> None:
        """Drop unfinished requests."""

    @property
    @abstractmethod
    def num_unfinished(self) -> int:
        """Requests submitted and not yet returned."""

    @property
    def progress(self) -> int:
        """Grows with every sampled token; one that grows with completions only makes the watchdog less patient."""
        return self.stats().generated_tokens

    def stats(self) -> SamplerStats:
        """A snapshot of the counters; zeros from a sampler that does not count."""
        return SamplerStats()

    def close(self) -> None:
        """Release the engine. Safe to call twice."""


def generate(sampler: Sampler, requests: Sequence[SampleRequest]) -> list[Completion]:
    """Run requests to the end and return completions in the order of the requests. No request stays behind."""
    finished: dict[int, Completion] = {}
    try:
        for request in requests:
            sampler.submit(request)
        while sampler.num_unfinished:
            finished.update({completion.id: completion for completion in sampler.step()})
    except BaseException:
        with suppress(Exception):  # an engine that broke may not even abort; what broke it is the error to tell
            sampler.abort([request.id for request in requests])
        raise
    return [finished[request.id] for request in requests]
