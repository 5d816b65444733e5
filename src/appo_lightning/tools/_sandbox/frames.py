"""Messages between the trainer and an interpreter: a fixed header, then bytes.

Both ends may be hostile to the other by accident (policy code can write into any open file), so a reader checks every
header and bounds every payload.
"""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass

READY = 1  # server to trainer: sessions can be forked; the payload says behind which walls
REFUSED = 2  # server to trainer: cannot start, the payload says why
CODE = 3  # trainer to session: run this source text
OUTPUT = 4  # session to trainer: what was printed
DONE = 5  # session to trainer: the call is over; the payload is the error line, or empty
LACKS = 7  # server to trainer: this machine cannot give it namespaces, the payload says why
STATE = 8  # session to trainer: a digest of the variables after the call; between OUTPUT and DONE
ENDED = 6  # server to trainer: the session's process is gone; the payload says how

_HEADER = struct.Struct("!4sBII")  # mark, kind, call number, payload bytes
_MARK = b"appo"
_KINDS = frozenset((READY, REFUSED, CODE, OUTPUT, DONE, STATE, ENDED, LACKS))


class BrokenFrame(Exception):
    """Bytes that are no message: the other end cannot be trusted any more."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message."""

    kind: int
    number: int  # the call that it belongs to; 0 outside a call
    payload: bytes


def pack(kind: int, number: int = 0, payload: bytes = b"") -> bytes:
    """One message as bytes."""
    return _HEADER.pack(_MARK, kind, number, len(payload)) + payload


def send(channel: socket.socket, kind: int, number: int = 0, payload: bytes = b"", flags: int = 0) -> None:
    """Write one message, as one write where the socket buffer allows.

    Raises:
        OSError: the other end is gone.
    """
    message = pack(kind, number, payload)
    if flags:
        channel.send(message, flags)
    else:
        channel.sendall(message)


def receive(channel: socket.socket, max_bytes: int, deadline: float | None = None) -> Frame:
    """Read one message.

    Args:
        channel: a stream socket.
        max_bytes: longest payload that is accepted.
        deadline: ``time.monotonic()`` at which to give up; None waits for ever.

    Raises:
        EOFError: the other end closed the channel.
        TimeoutError: the deadline passed.
        BrokenFrame: the bytes are no message, or too many.
    """
    mark, kind, number, size = _HEADER.unpack(_read(channel, _HEADER.size, deadline))
    if mark != _MARK or kind not in _KINDS or size > max_bytes:
        raise BrokenFrame(f"header {mark!r}, kind {kind}, {size} bytes")
    return Frame(kind, number, _read(channel, size, deadline))


def _read(channel: socket.socket, size: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        if deadline is not None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            channel.settimeout(remaining)
        part = channel.recv(min(size - len(parts), 1 << 16))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
