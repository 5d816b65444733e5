"""A digest of what a session's variables hold, by which a branch that repeated its root's calls is compared with it.

Numbers, text, bytes, NumPy arrays, and containers of them are told by their contents, up to a bound; anything else by
its type alone. No code of the policy's own classes runs.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from typing import Any

_BYTES = 1 << 18  # of all variables together; what is beyond counts by its length
_DEEPEST = 6
_SCALARS = (bool, float, complex, type(None))
_WHOLE_INT_BITS = 1 << 12


def digest(scope: dict[str, Any]) -> str:
    """16 hexadecimal digits; "" where the variables cannot be read."""
    try:
        reader = _Reader()
        variables = sorted((name, value) for name, value in list(scope.items()) if not name.startswith("__"))
        return hashlib.blake2b(reader.items(variables, _DEEPEST), digest_size=8).hexdigest()
    except Exception:  # policy code may have changed anything, and threads of its own go on
        return ""


class _Reader:
    def __init__(self) -> None:
        self._left = _BYTES
        self._numpy = sys.modules.get("numpy")

    def value(self, value: Any, depth: int) -> bytes:
        """What a value is, as bytes."""
        kind = type(value)
        if kind in _SCALARS:
            return self._charged(repr(value).encode())
        if kind is int:
            whole = value.bit_length() <= _WHOLE_INT_BITS
            return self._charged(b"%x" % value if whole else b"%d mod p" % hash(value))
        if kind is str:
            shown = value[: max(0, self._left)].encode("utf-8", "surrogatepass")
            return b"text %d %s" % (len(value), self._charged(shown))
        if kind is bytes or kind is bytearray:
            # Through a view: a slice of a bytearray for which there is no memory breaks Python.
            with memoryview(value) as view:
                return b"bytes %d %s" % (len(value), self._charged(bytes(view[: max(0, self._left)])))
        if kind in (list, tuple, dict, set, frozenset):
            return b"%s %d(%s)" % (kind.__name__.encode(), len(value), self._inside(value, kind, depth))
        if self._numpy is not None and issubclass(kind, self._numpy.generic | self._numpy.ndarray):
            return self._array(self._numpy.asarray(value))
        return self._charged(f"{kind.__module__}.{kind.__qualname__}".encode())

    def items(self, pairs: Iterable[tuple[Any, Any]], depth: int) -> bytes:
        """Names or keys with their values."""
        found = []
        for key, value in pairs:
            if self._left <= 0:
                break
            found.append(self.value(key, depth) + b"=" + self.value(value, depth))
        return b",".join(found)

    def _inside(self, container: Any, kind: type, depth: int) -> bytes:
        if depth == 0:  # also where a container holds itself
            return b""
        if kind is dict:
            return self.items(container.items(), depth - 1)
        found = []
        for value in container:
            if self._left <= 0:
                break
            found.append(self.value(value, depth - 1))
        return b",".join(sorted(found) if kind in (set, frozenset) else found)

    def _array(self, array: Any) -> bytes:
        told = f"{array.dtype.str}{array.shape}".encode()
        if array.dtype.hasobject or (array.nbytes > _BYTES and not array.flags.c_contiguous):
            return self._charged(told)
        values = array.reshape(-1)[: max(0, self._left) // max(1, array.itemsize)]
        return told + self._charged(values.tobytes())

    def _charged(self, told: bytes) -> bytes:
        self._left -= len(told) + 8
        return told
