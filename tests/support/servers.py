"""A web server on this machine that gives ranges of files, counts what it sends, and can be told to misbehave."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class Asked:
    """Hold one request, and its answer before it is sent: what a test may change."""

    path: str
    query: str
    headers: dict[str, str]
    start: int
    stop: int
    status: int
    answer: dict[str, str]
    body: bytes
    cut: int = 0  # bytes that are announced and never sent


@dataclass
class Server:
    """Serve the files of a folder; ``change`` may alter an answer, ``sent`` counts bytes of bodies."""

    folder: Path
    address: str = ""
    asked: list[Asked] = field(default_factory=list)
    sent: int = 0
    change: Callable[[Asked], None] = lambda asked: None
    tag: str = ""  # told instead of the real one where only the head of an answer is asked for

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"

    def answer(self, handler: BaseHTTPRequestHandler) -> Asked:
        parts = urlsplit(handler.path)
        asked = Asked(parts.path, parts.query, dict(handler.headers), 0, 0, 404, {}, b"no such file")
        path = self.folder / unquote(parts.path).lstrip("/")
        match = _RANGE.fullmatch(handler.headers.get("Range", ""))
        if path.is_file() and match is not None:
            self._give(asked, path, int(match[1]), int(match[2]) + 1)
        self.asked.append(asked)
        self.change(asked)
        return asked

    def _give(self, asked: Asked, path: Path, start: int, stop: int) -> None:
        status = path.stat()
        stop = min(stop, status.st_size)
        asked.start, asked.stop = start, stop
        asked.answer = {"ETag": f'"{status.st_mtime_ns:x}-{status.st_size:x}"', "Accept-Ranges": "bytes"}
        if start >= status.st_size:
            asked.status, asked.body = 416, b""
            asked.answer["Content-Range"] = f"bytes */{status.st_size}"
            return
        with path.open("rb") as file:
            file.seek(start)
            asked.status, asked.body = 206, file.read(stop - start)
        asked.answer["Content-Range"] = f"bytes {start}-{stop - 1}/{status.st_size}"


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    """Serve a folder as long as the block lasts."""
    server = Server(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = server.answer(self)
            self.send_response(asked.status)
            for name, value in asked.answer.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(asked.body)))
            body = asked.body[: len(asked.body) - asked.cut]
            server.sent += len(body)
            self._headers_buffer.append(b"\r\n" + body)  # in one piece: else every answer waits for an acknowledgement
            self.flush_headers()
            self.close_connection = bool(asked.cut)

        def do_HEAD(self) -> None:
            """Answer as an object store does that is asked for an object's size and version."""
            path = server.folder / unquote(urlsplit(self.path).path).lstrip("/")
            self.send_response(200 if path.is_file() else 404)
            if path.is_file():
                status = path.stat()
                self.send_header("ETag", server.tag or f'"{status.st_mtime_ns:x}"')
                self.send_header("Content-Length", str(status.st_size))
                self.send_header("Last-Modified", formatdate(status.st_mtime, usegmt=True))
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Say nothing of a client that hangs up."""

    with Listener(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        thread = Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        server.address = f"http://127.0.0.1:{listener.server_port}"
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()
