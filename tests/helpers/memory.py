"""Watches how large tensors over the vocabulary become."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestOverVocabulary(TorchDispatchMode):
    """Tokens of the largest tensor over the vocabulary that any operation made, in forward and backward passes."""

    def __init__(self, vocabulary: int, hidden_size: int) -> None:
        super().__init__()
        self.vocabulary, self.hidden_size, self.tokens = vocabulary, hidden_size, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and self.vocabulary in tensor.shape:
                others = [size for size in tensor.shape if size != self.vocabulary]
                if others != [self.hidden_size]:  # the weight of head or embedding, and its gradient
                    self.tokens = max(self.tokens, tensor.numel() // self.vocabulary)
        return out
