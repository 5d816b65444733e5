"""A sandbox service: the local sandbox of this machine for trainers elsewhere, over HTTP and JSON.

    python -m appo_lightning.tools.sandbox_server --host 127.0.0.1 --port 8700

The reference for the protocol in ``docs/sandbox_service.md``; its client is ``HTTPBackend``.
"""

from __future__ import annotations

import argparse
import contextlib
import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from appo_lightning.errors import ConfigurationError
from appo_lightning.tools._sandbox import frames
from appo_lightning.tools._sandbox.client import ForkServer
from appo_lightning.tools._sandbox.limits import Limits
from appo_lightning.tools.backends.http import TIME_LIMIT

TOKEN_VARIABLE = "APPO_SANDBOX_TOKEN"
_MAX_BODY_BYTES = 1 << 24
_MAX_ERROR_BYTES = 8192
_MAX_KINDS = 16  # of limits in use at once: each has a fork server
_LONGEST_CALL_S = 600.0


class RefusedError(Exception):
    """A request that is not answered; the client is told why."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Session:
    """One interpreter; its calls wait for each other."""

    def __init__(self, channel: socket.socket, limits: Limits) -> None:
        self._channel, self._limits = channel, limits
        self._lock = threading.Lock()
        self._number = 0
        self.used = time.monotonic()

    def call(self, code: str, timeout_s: float) -> dict[str, Any]:
        """Output, digest of the state, error line, and how the interpreter ended, if it did."""
        with self._lock:
            self._number += 1
            deadline = time.monotonic() + timeout_s
            try:
                self._channel.settimeout(timeout_s)
                with contextlib.suppress(BrokenPipeError):
                    frames.send(self._channel, frames.CODE, self._number, code.encode("utf-8", "surrogatepass"))
                output = self._receive(frames.OUTPUT, deadline)
                state = self._receive(frames.STATE, deadline)
                error = self._receive(frames.DONE, deadline)
            except TimeoutError:
                return {"output": "", "error": "", "ended": TIME_LIMIT}
            except (EOFError, OSError, frames.BrokenFrame):
                return {"output": "", "error": "", "ended": "killed"}
            except _Ended as ended:
                return {"output": "", "error": "", "ended": str(ended)}
            finally:
                self.used = time.monotonic()
        texts = {"output": output, "state": state, "error": error}
        return {name: text.decode("utf-8", "replace") for name, text in texts.items()} | {"ended": None}

    def close(self) -> None:
        """End the interpreter; a running call returns."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._channel.close()

    def _receive(self, kind: int, deadline: float) -> bytes:
        frame = frames.receive(self._channel, self._limits.output_bytes + _MAX_ERROR_BYTES, deadline)
        while 0 < frame.number < self._number:
            frame = frames.receive(self._channel, self._limits.output_bytes + _MAX_ERROR_BYTES, deadline)
        if frame.kind == frames.ENDED:
            raise _Ended(frame.payload.decode("utf-8", "replace"))
        if (frame.kind, frame.number) != (kind, self._number):
            raise frames.BrokenFrame("it wrote into its own channel")
        return frame.payload


class _Ended(Exception):
    """The interpreter's process is gone; the message says how."""


class Service:
    """Sessions by their names.

    Args:
        allow_unsafe: run even where a protection is missing.
        idle_s: seconds after which a session that nobody uses is ended.
        max_sessions: at the same time.
    """

    def __init__(self, *, allow_unsafe: bool, idle_s: float, max_sessions: int) -> None:
        self._allow_unsafe, self._idle_s, self._max_sessions = allow_unsafe, idle_s, max_sessions
        self._lock = threading.Lock()
        self._servers: dict[str, ForkServer] = {}
        self._sessions: dict[str, _Session] = {}

    def protections(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """What protects this machine."""
        server, _ = self._server(wanted)
        return {"protections": asdict(server.start())}

    def open(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """A new session."""
        server, limits = self._server(wanted)
        server.start()
        self._end_idle()
        with self._lock:
            if len(self._sessions) >= self._max_sessions:
                raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, f"{self._max_sessions} sessions are open")
            name = secrets.token_hex(16)
            self._sessions[name] = _Session(server.connect(), limits)
        return {"id": name}

    def call(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        """One call; an interpreter that ended is no session any more."""
        code, timeout_s = asked.get("code"), asked.get("timeout_s")
        if not isinstance(code, str) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= _LONGEST_CALL_S:
            raise RefusedError(
                HTTPStatus.BAD_REQUEST, f"expected code, a text, and timeout_s up to {_LONGEST_CALL_S:g}"
            )
        with self._lock:
            session = self._sessions.get(name)
        if session is None:
            raise RefusedError(HTTPStatus.NOT_FOUND, "no such session")
        answer = session.call(code, timeout_s)
        if answer["ended"] is not None:
            self.end(name)
        return answer

    def end(self, name: str) -> dict[str, Any]:
        """End a session; no error if it is gone."""
        with self._lock:
            session = self._sessions.pop(name, None)
        if session is not None:
            session.close()
        return {}

    def close(self) -> None:
        """End everything."""
        for name in list(self._sessions):
            self.end(name)
        for server in self._servers.values():
            server.close()

    def _end_idle(self) -> None:
        latest = time.monotonic() - self._idle_s
        for name in [name for name, session in list(self._sessions.items()) if session.used < latest]:
            self.end(name)

    def _server(self, wanted: dict[str, Any]) -> tuple[ForkServer, Limits]:
        try:
            limits = Limits(**wanted["limits"])
            packages, preload = bool(wanted["packages"]), [str(name) for name in wanted["preload"]]
        except (KeyError, TypeError) as error:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"expected limits, packages and preload ({error})") from error
        if not all(isinstance(value, int) and value > 0 for value in asdict(limits).values()):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "limits must be positive whole numbers")
        key = json.dumps([asdict(limits), packages, preload])
        with self._lock:
            if key not in self._servers:
                if len(self._servers) >= _MAX_KINDS:
                    raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, f"{_MAX_KINDS} kinds of limits are in use")
                self._servers[key] = ForkServer(
                    limits, packages=packages, preload=preload, waiting=4, allow_unsafe=self._allow_unsafe
                )
            return self._servers[key], limits


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections
    server: SandboxServer

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        try:
            content = self._content()
            self._check_token()
            status, answer = HTTPStatus.OK, self._route(content)
        except RefusedError as refused:
            status, answer = refused.status, {"error": str(refused)}
        except ConfigurationError as error:
            status, answer = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)}
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _route(self, content: dict[str, Any]) -> dict[str, Any]:
        service = self.server.service
        match self.command, self.path.strip("/").split("/"):
            case "POST", ["protections"]:
                return service.protections(content)
            case "POST", ["sessions"]:
                return service.open(content)
            case "POST", ["sessions", name, "calls"]:
                return service.call(name, content)
            case "DELETE", ["sessions", name]:
                return service.end(name)
        raise RefusedError(HTTPStatus.NOT_FOUND, f"no {self.command} {self.path}")

    def _content(self) -> dict[str, Any]:
        size = int(self.headers.get("Content-Length") or 0)
        if size > _MAX_BODY_BYTES:
            self.close_connection = True  # the rest is not read
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {_MAX_BODY_BYTES} bytes")
        try:
            content = json.loads(self.rfile.read(size) or b"{}")
        except ValueError as error:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"expected JSON ({error})") from error
        if not isinstance(content, dict):
            raise RefusedError(HTTPStatus.BAD_REQUEST, "expected a JSON object")
        return content

    def _check_token(self) -> None:
        token = self.server.token
        given = self.headers.get("Authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise RefusedError(HTTPStatus.UNAUTHORIZED, f"expected the token of ${TOKEN_VARIABLE}")

    def log_message(self, format: str, *args: Any) -> None:
        pass  # a line for each call would be millions


class SandboxServer(ThreadingHTTPServer):
    """The service on a port.

    Args:
        address: host and port.
        service: what it serves.
        token: that requests must bring; "": none.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], service: Service, token: str) -> None:
        self.service, self.token = service, token
        super().__init__(address, _Handler)


def main() -> int:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8700, help="0: any free one")
    parser.add_argument("--max-sessions", type=int, default=1024)
    parser.add_argument("--idle-s", type=float, default=3600.0, help="seconds until an unused session is ended")
    parser.add_argument("--allow-unsafe", action="store_true", help="run even where a protection is missing")
    options = parser.parse_args()
    token = os.environ.pop(TOKEN_VARIABLE, "")
    if options.host not in ("127.0.0.1", "localhost", "::1") and not token:
        print(f"error: expected a token in ${TOKEN_VARIABLE} to listen on {options.host}, found none", file=sys.stderr)
        return 1
    service = Service(allow_unsafe=options.allow_unsafe, idle_s=options.idle_s, max_sessions=options.max_sessions)
    server = SandboxServer((options.host, options.port), service, token)
    print(f"sandbox service on http://{options.host}:{server.server_address[1]}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        service.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
