"""A local web server that misbehaves as told."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """One answer; the default is that of a good server."""

    status: int = 0
    """Instead of the file."""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """Instead of the file's bytes."""
    ranges: bool = True
    etag: str = '"v1"'
    drop: int | None = None
    """Cut the connection after this many bytes of the answer."""
    rude: bool = False
    """Cut it with a reset."""
    trickle: float = 0.0
    """Seconds between two bytes."""
    hang: int | None = None
    """Say nothing more after this many bytes."""
    chunked: bool = False
    """Without a length, in chunks."""
    obey_if_range: bool = True


@dataclass
class Request:
    path: str
    first: int
    """Where the answer was asked to begin."""
    if_range: str | None
    agent: str


class WebServer:
    """Files, and for each path a list of answers, of which the last repeats."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.plans: dict[str, list[Answer]] = {}
        self.requests: list[Request] = []
        self.closing = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                try:
                    owner.answer(self)
                except OSError:
                    pass  # the client has gone, as some tests want
                self.close_connection = True

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def add(self, path: str, body: bytes, *plan: Answer) -> str:
        self.files[path], self.plans[path] = body, list(plan)
        return self.url + path

    def answer(self, http: BaseHTTPRequestHandler) -> None:
        path = http.path
        asked = http.headers.get("Range")
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if_range = http.headers.get("If-Range")
        self.requests.append(Request(path, first, if_range, http.headers.get("User-Agent", "")))
        plan = self.plans.get(path) or [Answer()]
        answer = plan.pop(0) if len(plan) > 1 else plan[0]
        if path not in self.files and not answer.status:
            answer = Answer(status=404)
        if answer.status:
            self._send(http, answer, answer.status, {}, answer.body or b"")
            return
        body = self.files[path] if answer.body is None else answer.body
        same = if_range in (None, answer.etag) or not answer.obey_if_range
        if not (asked and answer.ranges and same):
            self._send(http, answer, 200, {}, body)
        elif first >= len(body):
            self._send(http, answer, 416, {"Content-Range": f"bytes */{len(body)}"}, b"")
        else:
            span = f"bytes {first}-{len(body) - 1}/{len(body)}"
            self._send(http, answer, 206, {"Content-Range": span}, body[first:])

    def _send(self, http, answer: Answer, status: int, headers: dict[str, str], body: bytes) -> None:
        http.send_response(status)
        length = {"Transfer-Encoding": "chunked"} if answer.chunked else {"Content-Length": str(len(body))}
        etag = {"ETag": answer.etag} if answer.etag else {}
        kind = {"Content-Type": "application/octet-stream"}
        for name, value in (kind | length | etag | headers | answer.headers).items():
            http.send_header(name, value)
        http.end_headers()
        cut = next((n for n in (answer.drop, answer.hang) if n is not None), len(body))
        step = 1 if answer.trickle else max(1, cut)
        for start in range(0, min(cut, len(body)), step):
            piece = body[start : min(start + step, cut)]
            http.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if answer.chunked else piece)
            if answer.trickle and self.closing.wait(answer.trickle):
                return
        if answer.hang is not None:
            self.closing.wait()
        elif answer.chunked and answer.drop is None:
            http.wfile.write(b"0\r\n\r\n")
        if answer.rude:
            http.wfile.flush()
            http.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            http.connection.close()


@contextmanager
def serving() -> Iterator[WebServer]:
    web = WebServer()
    web.thread.start()
    try:
        yield web
    finally:
        web.closing.set()
        web.server.shutdown()
        web.server.server_close()
