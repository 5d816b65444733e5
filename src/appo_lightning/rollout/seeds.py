"""Seeds by name: every random choice of a rollout is a function of what it is for, never of when it is made."""

from __future__ import annotations

import hashlib


def derive_seed(*names: int | str) -> int:
    """A 62-bit seed from names such as (run seed, phase, task id, rollout index, turn)."""
    digest = hashlib.blake2b("\x1f".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
