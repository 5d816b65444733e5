"""vLLM inside the training process: continuous batching, a prefix cache, weights handed over in memory.

With the modules ``_vllm_*`` beside it the only part of the package that imports vLLM. What they touch below vLLM's
documented surface moves between releases, and has a test each; here it is what a request's output is put together by.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
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
from appo_lightning.samplers._vllm_adapters import checked_adapter, room_for_rank, set_adapter
from appo_lightning.samplers._vllm_engine import (
    import_vllm,
    memory_of_sleepers,
    preserved_process,
    shut_down,
    start_engine,
)
from appo_lightning.samplers._vllm_outputs import SampledLogprobs, StopDetector
from appo_lightning.samplers._vllm_reading import ADAPTER_ID, WeightReader, count_cached_tokens
from appo_lightning.samplers._vllm_writing import set_weights
from appo_lightning.samplers.base import Completion, Precision, Sampler, SampleRequest, SamplerStats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.v1.engine.llm_engine import LLMEngine

# What has an option of its own, and what the sampler relies on: `engine_options` may not set it a second time.
OWN_OPTIONS = {
    "dtype": "dtype",
    "kv_cache_memory_bytes": "kv_cache_mb",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "max_num_seqs": "max_num_seqs",
    "block_size": "block_size",
    "enforce_eager": "enforce_eager",
    "enable_sleep_mode": "sleep_between_phases",
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
        "enable_lora",
        "max_lora_rank",
        "max_loras",
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
        sleep_between_phases: give the GPU's memory (cache and weights) to training while nothing is sampled, so that
            one GPU holds both. CUDA only.
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
        sleep_between_phases: bool = False,
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
        self.sleep_between_phases = sleep_between_phases
        self.engine_options = dict(engine_options or {})
        self._engine: LLMEngine | None = None
        self._adapter_rank = 0  # 0: whole weights
        self._asleep = False
        self._failure: BaseException | None = None
        self._unfinished: dict[int, SampleRequest] = {}
        self._stops: dict[tuple[str, ...], StopStrings] = {}
        self._stats = SamplerStats()

    def start(self, checkpoint: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> None:
        if self._engine is not None:
            raise SamplerError("the sampler is already started: close it first")
        from transformers import AutoConfig, AutoModelForCausalLM

        with ordinary_tensors(), preserved_process(), preserved_rng(), self._sampling_threads():
            import_vllm()
            self._check_sleep()
            config = AutoConfig.from_pretrained(checkpoint)
            with torch.device("meta"):
                self._shapes, self._aliases = parameter_shapes(AutoModelForCausalLM.from_config(config))
            try:
                self._engine = start_engine(self._engine_arguments(checkpoint, config, max_length))
            except Exception as error:
                raise SamplerError(f"vLLM did not start: {_told(error)}") from error
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._vocab_size = int(config.get_text_config().vocab_size)
        self._eos_token_ids = find_eos_token_ids(checkpoint, tokenizer)
        self._stats = SamplerStats()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self._adapter_rank:
            raise SamplerError("the engine was started for adapters: use load_adapter")
        with self._taking_weights() as engine:
            if self._asleep:
                # The cache comes after the weights: what is gathered for the push needs room as well.
                engine.wake_up(["weights"])
            rpc: Any = engine.collective_rpc
            rpc(set_weights, args=(checked_weights(weights, self._shapes, self._aliases), self._shapes))
            if self._asleep:
                engine.wake_up(["kv_cache"])
                self._asleep = False

    def expect_adapter(self, rank: int) -> None:
        room_for_rank(rank)
        self._adapter_rank = rank

    def load_adapter(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        if not self._adapter_rank:
            raise SamplerError("the engine was started for whole weights: call expect_adapter before start")
        with self._taking_weights() as engine:
            adapter = checked_adapter(weights, self._adapter_rank)
            rpc: Any = engine.collective_rpc
            rpc(set_adapter, args=(adapter,))

    def read_weights(self, columns: Mapping[str, Sequence[int]]) -> dict[str, list[torch.Tensor]]:
        with self.reading(columns) as held:
            pass
        return held

    @contextmanager
    def reading(self, columns: Mapping[str, Sequence[int]]) -> Iterator[dict[str, list[torch.Tensor]]]:
        engine = self._running()
        held: dict[str, list[torch.Tensor]] = {}
        with self._telling_weights():
            rpc: Any = engine.collective_rpc
            reader: WeightReader = rpc(WeightReader, args=(columns,))[0]
        # A compiled model would be compiled anew for every layer that listens.
        with reader.listening() if engine.vllm_config.model_config.enforce_eager else nullcontext():
            yield held
        with self._telling_weights():
            held.update(reader.read())

    @property
    def cached_tokens(self) -> int:
        return count_cached_tokens(self._running())

    def sleep(self) -> None:
        if not self.sleep_between_phases or self._asleep or self._engine is None or self._failure is not None:
            return
        if self._unfinished:
            raise SamplerError(f"{len(self._unfinished)} requests are unfinished: step until done, or abort them")
        with self._failing_for_good("sleep"):
            # Level 2 forgets the weights, level 1 keeps them in the machine's memory. Whole weights are pushed before
            # the engine is used again; those below an adapter are not.
            self._engine.sleep(level=1 if self._adapter_rank else 2)
        self._asleep = True

    def wake(self) -> bool:
        if not self._asleep:
            return True
        torch.cuda.empty_cache()  # torch keeps what training has freed; vLLM asks the device for its memory
        if not self._adapter_rank:
            return False  # load_weights wakes it
        with self._failing_for_good("wake up"):
            self._running().wake_up()
        self._asleep = False
        return True

    def submit(self, request: SampleRequest) -> None:
        engine = self._running()
        check_request(request, max_length=self._max_length, vocab_size=self._vocab_size, unfinished=self._unfinished)
        new_parameters, tokens_input, final_only = _request_types()
        parameters = new_parameters(
            max_tokens=request.max_tokens,
            seed=request.seed,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            # EOS comes as a stop token: vLLM knows no tokenizer here, and the generation config may name several.
            ignore_eos=True,
            stop_token_ids=sorted(self._eos_token_ids),
            logprobs=0,
            detokenize=False,
            output_kind=final_only,
            skip_clone=True,
        )
        with self._failing_for_good("take a request"):
            engine_id = engine.add_request(
                str(request.id), tokens_input(request.token_ids), parameters, lora_request=self._adapter_request()
            )
            state: Any = engine.output_processor.request_states[engine_id]
            state.logprobs_processor = SampledLogprobs()
            if request.stop:
                state.detokenizer = StopDetector(self._stop_strings(request.stop))
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
    def precision(self) -> Precision:
        engine = self._running()
        if engine.vllm_config.model_config.dtype != torch.float32:
            return "half"
        # vLLM's attention for float32 on a GPU is written in Triton, which multiplies in TF32.
        return "tf32" if engine.vllm_config.device_config.device_type == "cuda" else "float32"

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
        self._asleep = False
        self._unfinished.clear()
        self._stops.clear()
        if engine is not None:
            shut_down(engine)

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
            if not cpu:
                # Nothing is sized by it now, but vLLM still refuses to start unless this share of the GPU is free, and
                # its default is nearly all.
                arguments["gpu_memory_utilization"] = 0.01
        else:
            arguments["gpu_memory_utilization"] = self.gpu_memory_utilization or 0.4
        block_size = self.block_size or (32 if cpu else None)
        if block_size is not None:
            arguments["block_size"] = block_size
        if self._adapter_rank:
            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room_for_rank(self._adapter_rank)}
        if self.sleep_between_phases:
            arguments["enable_sleep_mode"] = True
        return {**arguments, **self.engine_options}

    def _check_sleep(self) -> None:
        from vllm.platforms import current_platform

        if self.sleep_between_phases and not current_platform.is_cuda():
            raise ConfigurationError(
                f"sampler.sleep_between_phases needs CUDA, the engine runs on {current_platform.device_type}: "
                "set it to false"
            )
        if self.sleep_between_phases and (held := memory_of_sleepers()):
            raise SamplerError(
                "with sampler.sleep_between_phases vLLM can start one engine per process, and an earlier one still "
                f"holds {held / 2**30:.1f} GiB: start again from the last checkpoint, or set it to false"
            )

    def _adapter_request(self) -> Any:
        from vllm.lora.request import LoRARequest

        # The engine holds the adapter under this id already: no path is ever read.
        return LoRARequest("policy", ADAPTER_ID, "in memory") if self._adapter_rank else None

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
            sequence.logprobs,  # one number per token: see SampledLogprobs
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
    def _taking_weights(self) -> Iterator[LLMEngine]:
        """Around every change of weights: nothing may run, and nothing that was cached before holds after it."""
        engine = self._running()
        if self._unfinished:
            raise SamplerError(f"{len(self._unfinished)} requests are unfinished: step until done, or abort them")
        with ordinary_tensors(), self._failing_for_good("take the weights"):
            yield engine
            if not engine.reset_prefix_cache():
                raise SamplerError("vLLM kept its prefix cache, which belongs to the old weights")

    @contextmanager
    def _telling_weights(self) -> Iterator[None]:
        with ordinary_tensors(), self._sampling_threads(), self._failing_for_good("tell its weights"):
            yield

    @contextmanager
    def _failing_for_good(self, action: str) -> Iterator[None]:
        # An engine interrupted in the middle holds half of a batch or half of the weights: nothing it says counts.
        try:
            yield
        except Exception as error:
            self._failure = error
            if isinstance(error, SamplerError):
                raise
            raise EngineFailure(f"vLLM failed to {action}: {_told(error)}") from error

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


@functools.cache  # an import statement costs as much as the objects it names
def _request_types() -> tuple[Any, Any, Any]:
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams, tokens_input, RequestOutputKind.FINAL_ONLY


def _told(error: Exception) -> str:
    said = f"{type(error).__name__}: {error}"
    # torch has a class for accelerators; on a CPU the allocator's message is all there is.
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in said:
        return f"out of memory; lower sampler.max_num_seqs, kv_cache_mb or gpu_memory_utilization ({said})"
    return said


def _checkpoint_dtype(config: Any) -> str:
    # vLLM's own "auto" would turn float32 into half precision.
    return str(config.dtype or torch.float32).removeprefix("torch.")
