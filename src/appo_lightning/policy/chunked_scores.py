"""Log-probs and entropies from hidden states, some tokens at a time: the logits of all tokens never exist together.

Axis letters: ``n`` tokens, ``c`` tokens of a chunk, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def chunked_scores(
    head: nn.Module, hidden: Tensor, targets: Tensor, *, temperature: float, with_entropy: bool, chunk: int
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target and entropy of its distribution, at a temperature.

    With z = head(hidden) / temperature: logprob = z_target - logsumexp(z), entropy = logsumexp(z) - sum(softmax(z) z).
    At most two tensors [chunk, V] live at a time (three with entropies), in the forward and in the backward pass: the
    logits of all chunks but the last are computed again in the backward pass.

    Args:
        head: maps [c, D] to logits [c, V].
        hidden: [n, D], n >= 1.
        targets: [n] token ids.
        temperature: logits are divided by it.
        with_entropy: also give entropies, without gradient.
        chunk: tokens whose logits exist at a time.

    Returns:
        [n] log-probs and [n] entropies or None, nats, float32.
    """
    states, ids = hidden.split(chunk), targets.split(chunk)
    logprobs, entropies = [], []
    for index in range(len(states)):
        # The backward pass begins with the last chunk, whose logits are still there: computing them again would cost
        # time and save nothing.
        if torch.is_grad_enabled() and index < len(states) - 1:
            logprob, entropy = checkpoint(
                _score,
                head,
                states[index],
                ids[index],
                temperature,
                with_entropy,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing here is random, and saving the state stops an accelerator
            )
        else:
            logprob, entropy = _score(head, states[index], ids[index], temperature, with_entropy)
        logprobs.append(logprob)
        entropies.append(entropy)
    return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None


def _score(
    head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    return _TargetLogprob.apply(head(hidden), targets, temperature, with_entropy)


class _TargetLogprob(torch.autograd.Function):
    """``log_softmax(logits / temperature)`` at the targets, in float32, with one buffer beside the logits.

    Composed of torch's functions, each of division, logsumexp and gather makes a gradient [c, V] of its own.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        highest = logits.amax(-1, keepdim=True).float()
        shifted = logits - highest  # half precision is raised to float32 by highest
        if temperature != 1.0:
            shifted /= temperature
        at_target = shifted.gather(-1, targets[:, None])[:, 0]
        weights = shifted.exp() if with_entropy else shifted.exp_()
        total = weights.sum(-1)
        log_total = total.log()
        entropy = log_total - weights.mul_(shifted).sum(-1) / total if with_entropy else None
        ctx.save_for_backward(logits, targets, highest[:, 0] + temperature * log_total)
        ctx.temperature = temperature
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return at_target - log_total, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
        # d logprob / d logits = (onehot - softmax) / temperature
        logits, targets, normaliser = ctx.saved_tensors
        gradient = gradient / ctx.temperature
        out = logits - normaliser[:, None]
        if ctx.temperature != 1.0:
            out /= ctx.temperature
        out.exp_().mul_(-gradient[:, None])
        out.scatter_add_(-1, targets[:, None], gradient[:, None])
        return out.to(logits.dtype), None, None, None
