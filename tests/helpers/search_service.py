"""A search provider in a thread: real HTTP, with faults on demand."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class SearchService:
    """What the service was asked, and what it does next.

    Faults are used up one per request: ``(status, headers, body)``, or a number of seconds to keep silent.
    """

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.times: list[float] = []
        self.faults: list = []
        self.results = 3
        self.url = ""

    def answer(self, request: dict) -> tuple[int, dict, bytes]:
        self.requests.append(request)
        self.times.append(time.monotonic())
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, tuple):
            return fault
        if fault is not None:
            time.sleep(fault)
        query, number = request["query"], len(self.requests)
        found = [
            {"title": f"<b>{query}</b> &amp; more", "snippet": f"answer {number}.{rank}"}
            for rank in range(self.results)
        ]
        # As some providers do, it repeats what it was given.
        found.append({"title": "asked with", "snippet": request["key"]})
        return 200, {}, json.dumps({"web": {"results": found}}).encode()


@contextmanager
def serving(port=0):
    service = SearchService()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            given = parse_qs(urlsplit(self.path).query)
            self.reply({name: values[0] for name, values in given.items()})

        def do_POST(self):
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, given):
            request = {"query": given.get("q"), "count": given.get("n"), "key": self.headers.get("X-Key", "")}
            status, headers, body = service.answer(request)
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:
                pass  # the client has hung up

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    service.url = f"http://127.0.0.1:{server.server_port}/search"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield service
    server.shutdown()
    server.server_close()
