"""Ranges of a file behind HTTP (RFC 9110, sections 13 to 15), asked of the address that was named and of no other."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.remote.ranges import Piece, changed

_TIMEOUT_SECONDS = 30
_PART, _BEYOND = 206, 416
_MOVED = (301, 302, 303, 307, 308)
_SAFE_IN_PATH = "/%:@!$&'()*+,;=~-._"
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})")
_REASONS = {
    200: "the server sends whole files only, no ranges; download the file first",
    401: "the server asks who you are (401); name an address that may be read without a password",
    403: "the server refuses it (403); ask for the right to read it, or for an address that is still valid",
    404: "the server has no such file (404); check the address",
    410: "the server has no such file any more (410); check the address",
    429: "the server asks for patience (429); try again later",
}


class HttpRanges:
    """Ask one server for ranges of one file; ``headers`` go to it alone, ``reasons`` say what its statuses mean."""

    def __init__(
        self, address: str, headers: Mapping[str, str] | None = None, reasons: Mapping[int, str] | None = None
    ) -> None:
        self.address = address
        self._reasons = {**_REASONS, **(reasons or {})}
        self._headers = {
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "User-Agent": "ckptool",
            "Cache-Control": "no-transform",
            **(headers or {}),
        }
        parts = split_address(address)
        self._target = quote(parts.path or "/", safe=_SAFE_IN_PATH) + (f"?{parts.query}" if parts.query else "")
        self._connection = _connect(parts)
        self._was_used = False

    def close(self) -> None:
        """Let the connection go."""
        self._connection.close()

    def fetch(self, start: int, stop: int) -> Piece:
        """Give the bytes from ``start`` to ``stop``, as ``Ranges.fetch`` says."""
        try:
            return self._piece(self._ask(start, stop), start, stop)
        except (OSError, HTTPException, UnicodeError) as error:
            self._connection.close()
            raise UnreadableCheckpoint(_failure(error)) from error
        except UnreadableCheckpoint:
            self._connection.close()
            raise

    def _ask(self, start: int, stop: int) -> HTTPResponse:
        """Send one request; a connection that the server let go in the meantime is opened once more."""
        headers = {**self._headers, "Range": f"bytes={start}-{stop - 1}"}
        try:
            self._connection.request("GET", self._target, headers=headers)
            response = self._connection.getresponse()
        except (ConnectionError, HTTPException):
            if not self._was_used:
                raise
            self._connection.close()
            self._connection.request("GET", self._target, headers=headers)
            response = self._connection.getresponse()
        self._was_used = True
        return response

    def _piece(self, response: HTTPResponse, start: int, stop: int) -> Piece:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        version = tuple(response.headers.get(name, "") for name in ("ETag", "Last-Modified"))
        if response.status == _BEYOND and found is not None:
            if start > 0:
                raise changed()
            self._connection.close()
            return Piece(b"", int(found[3]), version)
        if response.status != _PART:
            raise refusal(self.address, response, self._reasons)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise UnreadableCheckpoint("the server compresses what it sends; download the file first")
        if found is None or found[1] is None:
            raise UnreadableCheckpoint("the server does not say which bytes it sends; download the file first")
        first, last, size = (int(number) for number in found.groups())
        if first != start or last != min(stop, size) - 1:
            raise UnreadableCheckpoint("the server sends other bytes than it was asked for; download the file first")
        wanted = last + 1 - first
        data = response.read(wanted)
        if len(data) != wanted:
            raise UnreadableCheckpoint(f"the connection ended {wanted - len(data):,} bytes too early; try again")
        if not response.isclosed():  # more follows than was announced
            self._connection.close()
        return Piece(data, size, version)


def split_address(address: str) -> SplitResult:
    """Take an address apart.

    :raises UnreadableCheckpoint: it names no server, or tells a password.
    """
    if " " in address:
        raise UnreadableCheckpoint("the address holds blanks; write them as %20")
    try:
        parts = urlsplit(address)
        named = parts.hostname and parts.port != 0
    except ValueError:
        named = None
    if not named:
        raise UnreadableCheckpoint("the address names no server; write it as https://SERVER/PATH")
    if parts.username is not None:
        raise UnreadableCheckpoint("the address tells a name or a password, which would be shown; leave it out")
    return parts


class Refused(UnreadableCheckpoint):
    """Give up on an answer that is not the range that was asked for; ``target`` is where it sends on to, if it does."""

    def __init__(self, message: str, status: int, target: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.target = target


def refusal(address: str, response: HTTPResponse, reasons: Mapping[int, str]) -> Refused:
    """Say what an answer means that is not the range that was asked for."""
    status = response.status
    if status in _MOVED:
        target = urljoin(address, response.headers.get("Location", ""))
        text = f"the server sends on to {target!r:.300} ({status}); name that address if you trust it"
        return Refused(text, status, target)
    advice = "try again later" if status >= 500 else "check the address"
    return Refused(reasons.get(status) or f"the server answers with status {status}; {advice}", status)


def _connect(parts: SplitResult) -> HTTPConnection:
    assert parts.hostname is not None
    if parts.scheme.lower() == "http":
        return HTTPConnection(parts.hostname, parts.port, timeout=_TIMEOUT_SECONDS)
    context = ssl.create_default_context()
    return HTTPSConnection(parts.hostname, parts.port, timeout=_TIMEOUT_SECONDS, context=context)


def _failure(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server cannot prove who it is ({error.verify_message}); do not trust it"
    if isinstance(error, TimeoutError):
        return f"the server was silent for {_TIMEOUT_SECONDS} seconds; try again later"
    if isinstance(error, OSError):
        return f"the server cannot be reached ({error.strerror or type(error).__name__}); check the address"
    return f"the server's answer is no HTTP ({type(error).__name__}); check the address"
