"""A file server on this machine that makes trouble when it is told to."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves a folder; `faults` says for how many requests of a file which trouble it makes."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.everywhere: list[str] = []
        self.requests: Counter[str] = Counter()
        self.starts: dict[str, list[int]] = defaultdict(list)
        """From which byte each request of a file was answered."""
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        count = self.server.requests[name]
        self.server.requests[name] += 1
        faults = self.server.faults.get(name, self.server.everywhere)
        fault = faults[count] if count < len(faults) else ""
        path = self.server.folder / name
        if fault in ("500", "503", "403"):
            return self.send_error(int(fault))
        if not path.is_file():
            return self.send_error(404)
        if fault == "drop":
            self.close_connection = True
            return self.connection.close()
        if fault.startswith("redirect "):
            self.send_response(302)
            self.send_header("Location", fault.removeprefix("redirect "))
            return self.end_headers()
        content, start = path.read_bytes(), 0
        if self.headers.get("Range") and fault != "no ranges":
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return self.send_error(416)
        self.server.starts[name].append(start)
        body = content[start:]
        if fault == "other bytes":
            body = bytes(len(body))
        self.send_response(206 if start else 200)
        if fault != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "truncate":
            self.wfile.write(body[: len(body) // 2])
        elif fault == "stall":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(1.5)
        elif fault in ("slow", "no length"):
            self._piecewise(body, max(1, len(body) // 8))
        elif fault == "trickle":
            self._piecewise(body[:2000], 50)
        else:
            self.wfile.write(body)

    def _piecewise(self, body: bytes, size: int) -> None:
        for place in range(0, len(body), size):
            self.wfile.write(body[place : place + size])
            self.wfile.flush()
            time.sleep(0.05)

    def log_message(self, *words: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of the folder, in a thread of its own."""
    with Server(folder) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()
