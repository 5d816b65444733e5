"""A causal language model that scores tokens: log-probs and entropies, never a ``[B, L, V]`` tensor.

Axis letters: ``B`` sequences, ``L`` padded tokens, ``n`` selected tokens, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from appo_lightning.errors import ConfigurationError
from appo_lightning.policy.chunked_scores import chunked_scores
from appo_lightning.policy.options import PolicyOptions
from appo_lightning.policy.tree_attention import KERNEL, use_tree_attention
from appo_lightning.policy.tree_packing import TreePacking, pack_tree, plan_packs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Models whose logits are more than a linear map of the last hidden state say so by one of these.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


@dataclass(slots=True)
class TokenScores:
    """What the policy thinks of each token of a batch."""

    logprobs: Tensor  # [B, L] nats; 0 where not asked for
    entropies: Tensor | None  # [B, L] nats over the full vocabulary, no gradient; 0 where not asked for


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor of a shard. Collective when sharded: every rank must call it in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class CausalPolicy(nn.Module):
    """A transformers causal LM, optionally with LoRA adapters, and its tokenizer.

    Args:
        options: see ``PolicyOptions``.

    Raises:
        ConfigurationError: the path holds no checkpoint, or LoRA targets do not exist.
    """

    def __init__(self, options: PolicyOptions) -> None:
        super().__init__()
        self.options = options
        self.tokenizer = load_tokenizer(options.path)
        self.model: nn.Module = _load_model(options)
        if options.lora is not None:
            self.model = _with_adapters(self.model, options)
        config = self._causal_lm.config
        for name in _LOGIT_TRANSFORMS:
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ConfigurationError(
                    f"{options.path}: config.{name} = {getattr(config, name)} transforms the logits, which this "
                    "policy does not compute; use a model without it"
                )

    @property
    def _causal_lm(self) -> Any:
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "peft_config") else model

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The transformer blocks, the natural units of sharding."""
        return self._causal_lm.get_decoder().layers

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model's position encoding was made for."""
        return int(self._causal_lm.config.max_position_embeddings)

    def forward(
        self, token_ids: Tensor, mask: Tensor, temperature: float, with_entropy: bool, packing: TreePacking | None
    ) -> tuple[Tensor, Tensor | None]:
        """See ``score``; goes through ``forward`` so that FSDP2's hooks gather the weights."""
        model = self._causal_lm
        # No padding mask: padding stands behind every token that counts and attention is causal. Without a mask the
        # kernels skip what lies in the future.
        where = {} if packing is None else {"position_ids": packing.position_ids, "tree": packing.attention}
        hidden = model.get_decoder()(input_ids=token_ids, use_cache=False, **where).last_hidden_state  # [B, L, D]
        # The hidden state of the token before predicts a token.
        rows, columns = mask.nonzero(as_tuple=True)
        before = columns - 1 if packing is None else packing.previous[columns]
        head = model.get_output_embeddings()
        out = hidden.new_zeros(token_ids.shape, dtype=torch.float32)
        if len(rows) == 0:
            # Nothing to score, but every weight takes part: DDP and FSDP2 wait for the gradients of all of them.
            unused = head(hidden[:1, 0]).float()
            return out + 0.0 * unused.sum(), out if with_entropy else None
        logprobs, entropies = chunked_scores(
            head,
            # Not hidden[rows, before]: where one is before several, threads would add up its gradient in any order.
            hidden.flatten(0, 1).index_select(0, rows * hidden.shape[1] + before),
            token_ids[rows, columns],
            temperature=temperature,
            with_entropy=with_entropy,
            chunk=self.options.logit_chunk,
        )
        index = (rows, columns)
        return out.index_put(index, logprobs), None if entropies is None else out.index_put(index, entropies)

    @torch.no_grad()
    def share_prefixes(self) -> None:
        """Make ready for ``score(packing=...)``, and make sure that packs are computed as the sequences alone are.

        Raises:
            ConfigurationError: its attention cannot be exchanged, or something else than attention to all earlier
                tokens carries information from token to token.
        """
        refusal = f"model.shared_prefixes needs attention to all earlier tokens, but {self.options.path} "
        if self.options.attn_implementation != KERNEL:
            raise ConfigurationError(
                f"{refusal}runs with policy.attn_implementation: {self.options.attn_implementation}; use {KERNEL}"
            )
        remedy = "; set model.shared_prefixes: false"
        config = self._causal_lm.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None) is not None:
            kinds = {"sliding_attention"}
        if kinds:
            raise ConfigurationError(f"{refusal}has layers of {', '.join(sorted(kinds))}{remedy}")
        # What a configuration does not tell, a few tokens do. Planned on the CPU, whatever the default device.
        rows = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 6, 4, 5], [1, 2, 3, 6, 4, 7]]  # sharing 3, then 5
        token_ids, lengths = torch.tensor(rows, device="cpu"), torch.full((3,), 6, device="cpu")
        (pack,) = plan_packs(token_ids, lengths, budget=18)
        device = next(self.model.parameters()).device
        packing = pack_tree(token_ids[pack.rows], lengths[pack.rows], pack).to(device)
        token_ids, lengths = token_ids[pack.rows].to(device), lengths[pack.rows].to(device)
        was_training = self.training
        self.eval()
        alone = self.score(token_ids, lengths).logprobs
        use_tree_attention(self._causal_lm, enabled=True)
        gap = float((self.score(token_ids, lengths, packing=packing).logprobs - alone).abs().max())
        self.train(was_training)
        if not gap <= (1e-3 if self.options.dtype == "float32" else 0.1):
            use_tree_attention(self._causal_lm, enabled=False)
            raise ConfigurationError(f"{refusal}scores packed tokens {gap:.3g} nats off{remedy}")

    def score(
        self,
        token_ids: Tensor,
        lengths: Tensor,
        *,
        mask: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        packing: TreePacking | None = None,
    ) -> TokenScores:
        """Log-prob (and entropy) of each token given the tokens before it, at a temperature.

        Args:
            token_ids: [B, L] right-padded.
            lengths: [B] tokens of each sequence.
            mask: [B, L] bool, the tokens to score; None scores all but the first. The first token has no
                prediction and is never scored.
            temperature: logits are divided by it.
            entropy: also return exact entropies (no gradient).
            packing: of exactly these rows: common beginnings are computed once; after ``share_prefixes``.

        Returns:
            ``logprobs[:, t] = log p(token_t | tokens < t)``, float32; 0 outside the mask and the padding.
        """
        inside = torch.arange(token_ids.shape[1], device=token_ids.device)[None] < lengths[:, None]
        mask = inside.clone() if mask is None else mask & inside
        mask[:, 0] = False
        if packing is None:
            return TokenScores(*self(token_ids, mask, temperature, entropy, None))
        logprobs, entropies = self(packing.token_ids, packing.pack(mask), temperature, entropy, packing)
        return TokenScores(
            packing.unpack(logprobs, mask), None if entropies is None else packing.unpack(entropies, mask)
        )

    def named_weights(self, *, merge: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Every weight under its transformers name, whole; the module is untouched.

        One tensor at a time, which bounds the peak under sharding by two copies of the largest. Collective under
        sharding: every rank must exhaust it.

        Args:
            merge: fold adapters in; False gives the weights below them.
        """
        self.release_gathered()
        adapted = _adapted_modules(self.model)
        for name, parameter in self.model.named_parameters():
            if ".lora_" in name:
                continue
            weight = full_tensor(parameter.detach())
            owner, _, leaf = name.rpartition(".base_layer.")
            if merge and owner and leaf == "weight":
                weight = _merged(weight, adapted[owner])
            yield _transformers_name(name), weight

    @torch.no_grad()
    def named_adapter(self) -> Iterator[tuple[str, Tensor]]:
        """The LoRA adapter as ``Sampler.load_adapter`` takes it: ``B @ A`` is the update. Collective under sharding."""
        self.release_gathered()
        for name, layer in _adapted_modules(self.model).items():
            module = _transformers_name(name)
            (adapter,) = layer.active_adapters
            down, up = _adapter_matrices(layer, adapter)
            yield f"{module}.lora_A.weight", down
            yield f"{module}.lora_B.weight", up * layer.scaling[adapter]

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that the optimiser moves, by their name inside this module."""
        return ((name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad)

    def release_gathered(self) -> None:
        """Under FSDP2, give gathered parameters back; after a no-grad forward the root keeps them otherwise."""
        if not torch.distributed.is_initialized():
            return
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def adapter_weights(self) -> dict[str, Tensor]:
        """LoRA tensors under PEFT's names, whole. Collective under sharding."""
        self.release_gathered()
        return {n: full_tensor(p.detach()).cpu() for n, p in self.model.named_parameters() if ".lora_" in n}

    def save(self, directory: str | Path, weights: dict[str, Tensor]) -> None:
        """Write a checkpoint directory with its tokenizer.

        Args:
            directory: made if missing.
            weights: what ``named_weights`` gave: an ordinary checkpoint for ``AutoModelForCausalLM``; or what
                ``adapter_weights`` gave: the adapters alone, for PEFT.
        """
        model: Any = self._causal_lm
        if any(".lora_" in name for name in weights):
            model = self.model
        elif self.options.lora is not None:
            # A fresh module: the live one carries adapters in its module tree.
            with torch.device("meta"):
                model = type(model)(model.config).to(model.dtype)  # the config file names the dtype
        model.save_pretrained(str(directory), state_dict={name: w.cpu() for name, w in weights.items()})
        if self.options.lora is not None and model is not self.model and model.generation_config is not None:
            self._causal_lm.generation_config.save_pretrained(str(directory))
        self.tokenizer.save_pretrained(str(directory))


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        ConfigurationError: there is none at the path.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"policy.path = {path!r}: expected a transformers checkpoint directory or Hub id with a tokenizer, "
            f"found none ({_first_line(error)})"
        ) from error


def _load_model(options: PolicyOptions) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            options.path,
            dtype=getattr(torch, options.dtype),
            attn_implementation=options.attn_implementation,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigurationError(
            f"policy.path = {options.path!r}: expected a causal LM that transformers can load, "
            f"got: {_first_line(error)}"
        ) from error
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _with_adapters(model: nn.Module, options: PolicyOptions) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    assert options.lora is not None
    config = LoraConfig(
        r=options.lora.rank,
        lora_alpha=options.lora.alpha,  # type: ignore[arg-type]
        target_modules=options.lora.target_modules,
        task_type="CAUSAL_LM",
    )
    if options.gradient_checkpointing:
        # Frozen embeddings give no gradient to the first checkpointed block otherwise.
        model.enable_input_require_grads()  # type: ignore[operator]
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigurationError(f"policy.lora: {_first_line(error)}") from error
    _require_linear(adapted)
    return adapted


def _require_linear(model: Any) -> None:
    head = model.get_base_model().get_output_embeddings()
    tied = model.get_base_model().config.tie_word_embeddings
    for name, layer in _adapted_modules(model).items():
        if not isinstance(layer.get_base_layer(), nn.Linear):
            raise ConfigurationError(
                f"policy.lora.target_modules: adapters fit linear modules, {_transformers_name(name)} is a "
                f"{type(layer.get_base_layer()).__name__}; leave it out"
            )
        if layer is head and tied:
            raise ConfigurationError(
                f"policy.lora.target_modules: {_transformers_name(name)} is tied to the embedding, which an adapter "
                "on it would change too; leave it out"
            )


def _adapted_modules(model: nn.Module) -> dict[str, Any]:
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def _merged(weight: Tensor, layer: Any) -> Tensor:
    """The weight below a layer's adapters, with all of them folded in."""
    for adapter in layer.active_adapters:
        down, up = _adapter_matrices(layer, adapter)
        delta = up.float() @ down.float() * layer.scaling[adapter]
        weight = (weight.float() + delta).to(weight.dtype)
    return weight


def _adapter_matrices(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return full_tensor(down.detach()), full_tensor(up.detach())


def _transformers_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
