"""One-line refusals shared by the pure functions: what was expected, what was found, what to do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from appo_lightning.errors import ConfigurationError


def require_matrices(mask: Tensor, **matrices: Tensor) -> None:
    """Refuse a mask that is not [B, T] bool and tensors whose shape differs from it.

    Raises:
        ValueError: the mask is not a bool matrix, or a shape differs.
    """
    require_mask(mask)
    if mask.dim() != 2:
        raise ValueError(f"mask must be [B, T], got shape {list(mask.shape)}: add the missing axis")
    for name, matrix in matrices.items():
        if matrix.shape != mask.shape:
            raise ValueError(
                f"{name} must have the shape of mask {list(mask.shape)}, got {list(matrix.shape)}: "
                f"pad {name} at the tokens that were not sampled"
            )


def require_mask(mask: Tensor, name: str = "mask") -> None:
    """Refuse a mask that is not bool: a float mask would silently weigh tokens.

    Raises:
        ValueError: the dtype is not bool.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool, got {mask.dtype}: pass {name}.bool()")


def require_vectors(length_of: str, **vectors: Tensor) -> None:
    """Refuse tensors that are not vectors of one common length.

    Args:
        length_of: what an entry stands for, in the plural, for the message.
        vectors: [N] each.

    Raises:
        ValueError: a tensor is not a vector, or lengths differ.
    """
    lengths = {name: list(vector.shape) for name, vector in vectors.items()}
    if any(len(shape) != 1 for shape in lengths.values()) or len({shape[0] for shape in lengths.values()}) > 1:
        raise ValueError(f"vectors of {length_of} must be 1-D and equally long, got {lengths}: give one entry each")


def require_finite(name: str, values: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        ValueError: a value is not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity: score or mask those entries first")


def require_rows(name: str, rows: Tensor, stop: int) -> None:
    """Refuse indices outside [0, stop).

    Raises:
        ValueError: the dtype is not int64, or an index is out of range.
    """
    if rows.dtype != torch.long:
        raise ValueError(f"{name} must be int64, got {rows.dtype}: pass {name}.long()")
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= stop):
        raise ValueError(
            f"{name} must lie in [0, {stop}), got values from {int(rows.min())} to {int(rows.max())}: "
            "count rows and tokens within this batch"
        )


def require_gamma(gamma: float) -> None:
    """Refuse a discount outside (0, 1].

    Raises:
        ConfigurationError: gamma is out of range or not a number.
    """
    if not 0.0 < gamma <= 1.0:
        raise ConfigurationError(f"gamma must be in (0, 1], got {gamma}: use gamma_from_half_life(tokens)")


def require_at_least(name: str, value: float, least: float, remedy: str) -> None:
    """Refuse an option below its least value, NaN and infinity.

    Raises:
        ConfigurationError: the value is too small or not finite.
    """
    if not (math.isfinite(value) and value >= least):
        raise ConfigurationError(f"{name} must be a finite number >= {least:g}, got {value}: {remedy}")


def require_above(name: str, value: float, bound: float, remedy: str) -> None:
    """Refuse an option that is not above its bound, NaN and infinity.

    Raises:
        ConfigurationError: the value is too small or not finite.
    """
    if not (math.isfinite(value) and value > bound):
        raise ConfigurationError(f"{name} must be a finite number > {bound:g}, got {value}: {remedy}")
