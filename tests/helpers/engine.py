"""A vLLM engine beside policies of the trainer: pushes between them, and how far they are apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from appo_lightning.policy.causal_lm import CausalPolicy
from appo_lightning.policy.options import LoraOptions, PolicyOptions
from appo_lightning.samplers.base import generate
from appo_lightning.samplers.read_back import ReadBack, ReadBackResult
from appo_lightning.samplers.vllm import VLLMSampler
from helpers.sampler_contract import some_requests


@dataclass
class Engine:
    """A started sampler, and the checkpoint that it was started from."""

    sampler: VLLMSampler
    checkpoint: str
    device: str = "cpu"

    def policy(self, lora: LoraOptions | None = None) -> CausalPolicy:
        return CausalPolicy(PolicyOptions(self.checkpoint, lora=lora)).to(self.device)

    def push(self, policy: CausalPolicy, instead: dict[str, Tensor] | None = None) -> ReadBackResult:
        """Push, with some tensors exchanged on the way, and read back while sampling."""
        read_back = ReadBack(4, push=0)
        changed = ((n, (instead or {}).get(n, w)) for n, w in read_back.noting(policy.named_weights()))
        self.sampler.load_weights(changed)
        with read_back.comparing(self.sampler) as result:
            generate(self.sampler, some_requests(2, max_tokens=1))
        return result

    def gap(self, policy: CausalPolicy, temperature: float = 1.0) -> float:
        """Largest difference between the sampler's log-probs and the policy's, nats."""
        requests = some_requests(6, temperature=temperature)
        gaps = []
        for request, completion in zip(requests, generate(self.sampler, requests), strict=True):
            ids = torch.tensor([request.token_ids + completion.token_ids], device=self.device)
            lengths = torch.tensor([ids.shape[1]], device=self.device)
            with torch.no_grad():
                scored = policy.score(ids, lengths, temperature=temperature).logprobs[0].cpu()
            gaps.append(scored[len(request.token_ids) :] - torch.tensor(completion.logprobs))
        return float(torch.cat(gaps).abs().max())
