from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from appo_lightning.errors import ConfigurationError, SamplerError
from appo_lightning.samplers import _vllm_engine
from appo_lightning.samplers.base import SampleRequest
from appo_lightning.samplers.vllm import VLLMSampler, _told
from helpers.tiny import build_tokenizer


def test_importing_the_module_imports_neither_vllm_nor_transformers() -> None:
    code = "import sys, appo_lightning.samplers.vllm; print({'vllm', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_missing_vllm_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SamplerError, match=r"pip install 'appo-lightning\[vllm\]'.*TransformersSampler"):
        VLLMSampler().start("unused", build_tokenizer(), max_length=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_mb": 64, "gpu_memory_utilization": 0.5}, "leave gpu_memory_utilization out"),
        ({"kv_cache_mb": 0}, "kv_cache_mb must be at least 1, got 0"),
        ({"num_threads": 0}, "num_threads must be at least 1, got 0"),
        ({"engine_options": {"dtype": "float32"}}, "use the sampler's option dtype"),
        ({"engine_options": {"kv_cache_memory_bytes": 1}}, "use the sampler's option kv_cache_mb"),
        ({"engine_options": {"logprobs_mode": "raw_logprobs"}}, "may not set logprobs_mode"),
    ],
)
def test_options_that_contradict_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        VLLMSampler(**options)


def test_an_untested_version_warns_once() -> None:
    with pytest.warns(UserWarning, match=r"tested with vLLM 0\.32\.\*, found 9\.9\.0"):
        _vllm_engine._check_version("9.9.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _vllm_engine._check_version("9.9.0")
        _vllm_engine._check_version("0.32.1")


def test_a_sampler_that_was_not_started_says_so() -> None:
    with pytest.raises(SamplerError, match="call start first"):
        VLLMSampler().submit(SampleRequest(0, [1], 1, seed=0))


def test_out_of_memory_names_what_to_lower() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 50)
    for error in (found.value, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")):
        assert _told(error).startswith("out of memory; lower sampler.max_num_seqs, kv_cache_mb or gpu_memory")
    assert _told(KeyError("q")) == "KeyError: 'q'"
