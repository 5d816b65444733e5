"""Many sockets over one pair of streams, as a container offers it: standard input and output.

A message is a header and bytes: session number, number of bytes. No bytes: that session is over. The first message of
a new number opens a session.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

_HEADER = struct.Struct("!II")
_PIECE = 1 << 16
_MOST_BYTES = 1 << 23  # that wait for a session which does not read: more is a flood
_ENOUGH_BYTES = 1 << 20  # that wait for the stream: sessions are not read meanwhile


@dataclass(slots=True)
class _Lane:
    """One session."""

    number: int
    channel: socket.socket
    waiting: bytearray = field(default_factory=bytearray)  # bytes for the channel
    ending: bool = False  # the other side is done; close when the bytes are out


class Multiplexer:
    """Carries bytes between one pair of streams and any number of sockets, in one thread.

    Args:
        incoming: file to read messages from.
        outgoing: file to write messages to.
        accept: makes the socket of a session that the other side opens; None: the other side may open none.
    """

    def __init__(self, incoming: int, outgoing: int, accept: Callable[[], socket.socket] | None = None) -> None:
        self._incoming, self._outgoing, self._accept = incoming, outgoing, accept
        self._lanes: dict[int, _Lane] = {}
        self._added: deque[socket.socket] = deque()
        self._numbers = 0
        self._received, self._waiting = bytearray(), bytearray()
        self._lock = threading.Lock()  # around what is added, and the end
        self._ended = False
        self._awake, self._wake = os.pipe()
        self._selector = selectors.DefaultSelector()

    @property
    def ended(self) -> bool:
        """Whether the stream has; known before any session sees its socket closed."""
        return self._ended

    def add(self, channel: socket.socket) -> None:
        """Open a session; from any thread. After the end the channel is closed at once."""
        with self._lock:
            if self._ended:
                channel.close()
                return
            self._added.append(channel)
            os.write(self._wake, b"a")

    def run(self) -> None:
        """Carry bytes until the stream ends; then every socket is closed."""
        for fd in (self._incoming, self._outgoing, self._awake):
            os.set_blocking(fd, False)
        self._selector.register(self._incoming, selectors.EVENT_READ)
        self._selector.register(self._awake, selectors.EVENT_READ)
        try:
            while self._turn():
                pass
        except (BrokenPipeError, ConnectionResetError):
            pass  # the other side is gone
        finally:
            with self._lock:
                self._ended = True
                os.close(self._awake)
                os.close(self._wake)
            self._selector.close()
            for channel in [lane.channel for lane in self._lanes.values()] + list(self._added):
                channel.close()

    def _turn(self) -> bool:
        for key, events in self._selector.select():
            if key.fd == self._incoming:
                if not self._read_stream():
                    return False
            elif key.fd == self._awake:
                os.read(self._awake, _PIECE)
                while self._added:
                    self._numbers += 1
                    self._open(self._numbers, self._added.popleft())
            elif key.fd != self._outgoing and key.data.number in self._lanes:
                if events & selectors.EVENT_WRITE:
                    self._write_channel(key.data)
                if events & selectors.EVENT_READ and key.data.number in self._lanes:
                    self._read_channel(key.data)
        self._write_stream()
        return True

    def _open(self, number: int, channel: socket.socket) -> _Lane:
        channel.setblocking(False)
        lane = self._lanes[number] = _Lane(number, channel)
        self._selector.register(channel, selectors.EVENT_READ, lane)
        return lane

    def _close(self, lane: _Lane, *, tell: bool) -> None:
        self._selector.unregister(lane.channel)
        lane.channel.close()
        del self._lanes[lane.number]
        if tell:
            self._waiting += _HEADER.pack(lane.number, 0)

    def _read_stream(self) -> bool:
        part = os.read(self._incoming, _PIECE)
        self._received += part
        while len(self._received) >= _HEADER.size:
            number, size = _HEADER.unpack_from(self._received)
            if len(self._received) < _HEADER.size + size:
                break
            payload = bytes(self._received[_HEADER.size : _HEADER.size + size])
            del self._received[: _HEADER.size + size]
            self._deliver(number, payload)
        return bool(part)

    def _deliver(self, number: int, payload: bytes) -> None:
        lane = self._lanes.get(number)
        if lane is None:
            if self._accept is None or not payload:
                return  # closed here meanwhile
            lane = self._open(number, self._accept())
        lane.ending = lane.ending or not payload
        lane.waiting += payload
        if len(lane.waiting) > _MOST_BYTES:
            self._close(lane, tell=True)
        else:
            self._write_channel(lane)

    def _write_channel(self, lane: _Lane) -> None:
        try:
            while lane.waiting:
                del lane.waiting[: lane.channel.send(lane.waiting)]
        except BlockingIOError:
            pass
        except OSError:
            lane.waiting.clear()  # it reads no more; what it said last is still read
        if lane.ending and not lane.waiting:
            self._close(lane, tell=False)
            return
        interest = selectors.EVENT_READ | (selectors.EVENT_WRITE if lane.waiting else 0)
        self._selector.modify(lane.channel, interest, lane)

    def _read_channel(self, lane: _Lane) -> None:
        if len(self._waiting) > _ENOUGH_BYTES:
            return
        try:
            part = lane.channel.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if part:
            self._waiting += _HEADER.pack(lane.number, len(part)) + part
        else:
            self._close(lane, tell=True)

    def _write_stream(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._waiting:
                del self._waiting[: os.write(self._outgoing, self._waiting)]
        registered = self._outgoing in self._selector.get_map()
        if self._waiting and not registered:
            self._selector.register(self._outgoing, selectors.EVENT_WRITE)
        elif registered and not self._waiting:
            self._selector.unregister(self._outgoing)
