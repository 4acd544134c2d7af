"""A web server with ranges whose faults a test chooses: replies that break off, errors, stalls, other versions."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["Fault", "WebServer", "serve"]

# Gets the number of a GET request, and its range. Returns what goes wrong with it.
Fault = Callable[[int, int, int], "str | int | None"]


class WebServer:
    """Serves the files of a folder.

    Attributes:
        requests: The range of each GET request, in their order.
        fault: Says what goes wrong with a request: ``None`` for nothing, an HTTP status, ``"cut:N"`` to close the
            connection after N bytes, ``"stall:S"`` to wait S seconds before the body, ``"short:N"`` to announce and to
            send N bytes only.
        has_ranges: Whether it sends parts of files.
        has_tags: Whether it sends an ``ETag`` and keeps to ``If-Match``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[int, int]] = []
        self.fault: Fault = lambda *_: None
        self.has_ranges = self.has_tags = True
        self.url = ""
        self.lock = threading.Lock()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: WebServer

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self._reply(with_body=False)

    def do_GET(self) -> None:
        self._reply(with_body=True)

    def _reply(self, *, with_body: bool) -> None:
        web, file = self.web, self.web.folder / self.path.partition("?")[0].lstrip("/")
        if not file.is_file():
            self._end(404)
            return
        data = file.read_bytes()
        tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        if web.has_tags and self.headers.get("If-Match", tag) != tag:
            self._end(412)
            return
        start, end, status = 0, len(data), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and web.has_ranges:
            start, end, status = int(asked[1]), min(len(data), int(asked[2] or len(data) - 1) + 1), 206
            if start >= len(data):
                self._end(416)
                return
        fault: str | int | None = None
        if with_body:
            with web.lock:
                web.requests.append((start, end))
                number = len(web.requests) - 1
            fault = web.fault(number, start, end)
        if isinstance(fault, int):
            self._end(fault)
            return
        kind, _, amount = (fault or "").partition(":")
        if kind == "short":
            end = min(end, start + int(amount))
        self.send_response(status)
        if web.has_tags:
            self.send_header("ETag", tag)
        self.send_header("Last-Modified", self.date_time_string(file.stat().st_mtime))
        self.send_header("Content-Length", str(end - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        if not with_body:
            return
        if kind == "stall":
            time.sleep(float(amount))
        body = data[start:end]
        with contextlib.suppress(OSError):
            self.wfile.write(body[: int(amount)] if kind == "cut" else body)
            self.wfile.flush()
        if kind == "cut":
            self.close_connection = True
            self.connection.close()

    def _end(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[WebServer]:
    """A context with a running server."""
    web = WebServer(folder)
    handler = type("_HandlerOfOneServer", (_Handler,), {"web": web})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        web.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield web
        finally:
            server.shutdown()
            thread.join()
