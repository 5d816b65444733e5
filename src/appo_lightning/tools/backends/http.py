"""Interpreters of a sandbox service, over HTTP and JSON; ``docs/sandbox_service.md`` describes the protocol."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import threading
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from appo_lightning.errors import ConfigurationError
from appo_lightning.tools._sandbox import frames
from appo_lightning.tools._sandbox.protections import Protections
from appo_lightning.tools._secrets import check_address, shown_address
from appo_lightning.tools.backends.base import Needs, PythonBackend

_MAX_CODE_BYTES = 1 << 23
_MARGIN_S = 5.0  # the service keeps the time of a call; this is for the way there and back
_CONNECT_S = 60.0  # the service may import modules first
TIME_LIMIT = "time limit"  # how an interpreter ended whose call took too long


class HTTPBackend(PythonBackend):
    """Run the interpreters at a sandbox service.

    Args:
        url: of the service, for example ``http://10.0.0.7:8700``.
        token_variable: environment variable with the token that the service asks for, if it is set. The token itself
            never stands in a configuration.
        allow_unsafe: run even where the service reports that a protection is missing, for code that you trust.
    """

    def __init__(self, url: str, token_variable: str = "APPO_SANDBOX_TOKEN", *, allow_unsafe: bool = False) -> None:
        check_address(url, "backend.url", f"put a token into ${token_variable}")
        if shown_address(url) != url:
            raise ConfigurationError("backend.url must end before '?' and '#': what stands behind has no effect")
        self.url, self.token_variable = url.rstrip("/"), token_variable
        self._allow_unsafe = allow_unsafe  # not among the options that change an answer

    def serve(self, needs: Needs) -> ServiceClient:
        return ServiceClient(self.url, self.token_variable, needs, allow_unsafe=self._allow_unsafe)


class ServiceError(Exception):
    """The service did not answer, or not with what was asked for."""


class ServiceClient:
    """Gives out interpreters of a service.

    Args:
        url: of the service.
        token_variable: environment variable with its token.
        needs: of the tool.
        allow_unsafe: run even where a protection is missing.
    """

    def __init__(self, url: str, token_variable: str, needs: Needs, *, allow_unsafe: bool) -> None:
        self._url, self._token_variable, self._needs = url, token_variable, needs
        self._allow_unsafe = allow_unsafe
        self._protections: Protections | None = None
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()

    def start(self) -> Protections:
        with self._lock:
            if self._protections is None:
                try:
                    found = self._request(self._connection(_CONNECT_S), "POST", "/protections", self._wanted())
                    protections = Protections.from_service(found["protections"], f"at {self._url}")
                except (ServiceError, KeyError, TypeError) as error:
                    raise ConfigurationError(
                        f"python tool: expected a sandbox service at {self._url}, found: {error}; start one with "
                        "python -m appo_lightning.tools.sandbox_server, or correct backend.init_args.url"
                    ) from error
                if not (protections.complete or self._allow_unsafe):
                    raise ConfigurationError(
                        f"python tool: expected a sandbox service that keeps policy code behind walls, found at "
                        f"{self._url} missing: {', '.join(protections.missing) or 'everything, as nothing is held'}; "
                        "mend that machine (docs/security.md), or set backend.init_args.allow_unsafe: true to run "
                        "without, for code that you trust"
                    )
                self._protections = protections
            return self._protections

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with self._lock:
            self._open.add(theirs)
        threading.Thread(target=self._serve, args=(theirs,), daemon=True, name="appo-sandbox").start()
        return ours

    def close(self) -> None:
        with self._lock:
            for channel in self._open:
                with contextlib.suppress(OSError):  # it hung up
                    channel.shutdown(socket.SHUT_RDWR)

    def _serve(self, channel: socket.socket) -> None:
        """Turn the frames of one session into requests until the session hangs up."""
        connection = self._connection(self._needs.timeout_s + _MARGIN_S)
        path = ""
        try:
            while True:
                call = frames.receive(channel, _MAX_CODE_BYTES)
                path = path or f"/sessions/{self._request(connection, 'POST', '/sessions', self._wanted())['id']}"
                asked = {"code": call.payload.decode("utf-8", "surrogatepass"), "timeout_s": self._needs.timeout_s}
                answer = self._request(connection, "POST", f"{path}/calls", asked)
                if answer["ended"] is not None:
                    path = ""
                    if answer["ended"] == TIME_LIMIT:
                        frames.receive(channel, _MAX_CODE_BYTES)  # the session hangs up by its own clock
                    frames.send(channel, frames.ENDED, 0, str(answer["ended"]).encode())
                    return
                output = str(answer["output"]).encode("utf-8", "replace")[: self._needs.limits.output_bytes]
                frames.send(channel, frames.OUTPUT, call.number, output)
                frames.send(channel, frames.STATE, call.number, str(answer.get("state", "")).encode("utf-8", "replace"))
                frames.send(channel, frames.DONE, call.number, str(answer["error"]).encode("utf-8", "replace"))
        except (EOFError, OSError, frames.BrokenFrame):
            pass  # the session hung up
        except (ServiceError, KeyError, TypeError) as error:
            self._tell(channel, f"the sandbox service failed: {error}")
        finally:
            with self._lock:
                self._open.discard(channel)
                channel.close()
            self._end(connection, path)

    def _tell(self, channel: socket.socket, how: str) -> None:
        with contextlib.suppress(OSError):  # the session hung up meanwhile
            frames.send(channel, frames.ENDED, 0, how.encode())

    def _end(self, connection: http.client.HTTPConnection, path: str) -> None:
        try:
            if path:
                self._request(connection, "DELETE", path)
        except ServiceError:
            pass  # the service ends sessions that nobody uses
        finally:
            connection.close()

    def _wanted(self) -> dict[str, Any]:
        return {
            "limits": asdict(self._needs.limits),
            "packages": self._needs.packages,
            "preload": list(self._needs.preload),
        }

    def _connection(self, timeout_s: float) -> http.client.HTTPConnection:
        address = urlsplit(self._url)
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        assert address.hostname is not None
        return kind(address.hostname, address.port, timeout=timeout_s)

    def _request(
        self, connection: http.client.HTTPConnection, method: str, path: str, content: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(self._token_variable):
            headers["Authorization"] = f"Bearer {token}"
        body = None if content is None else json.dumps(content).encode()
        try:
            connection.request(method, urlsplit(self._url).path + path, body, headers)
            response = connection.getresponse()
            answer = response.read()
            found = json.loads(answer) if answer else {}
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            raise ServiceError(f"{method} {path}: {error or type(error).__name__}") from error
        if response.status >= 400:
            raise ServiceError(f"{method} {path}: status {response.status}, {found.get('error', 'no reason given')}")
        return found
