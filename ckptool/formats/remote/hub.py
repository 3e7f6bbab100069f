"""Files on the Hugging Face Hub, ``hf://ORG/MODEL[@REVISION]/FILE``: resolved there, fetched where it sends on to.

Sources: huggingface_hub, ``constants.py`` (endpoint, the places of the token) and ``file_download.py`` (``hf_hub_url``;
the token goes to the Hub alone).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.remote.http import HttpRanges, Refused
from ckptool.formats.remote.ranges import Piece

_ADDRESS = re.compile(
    r"hf://(?P<repository>(?:(?:datasets|spaces)/)?[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?/(?P<file>.+)",
    re.IGNORECASE | re.ASCII,
)
_TOKEN = re.compile(r"[\x21-\x7e]{1,1000}")
_MOST_MOVES = 5
_LOG_IN = "ask for access on its page there, then log in with hf auth login or set HF_TOKEN"
_REASONS = {
    401: f"the Hub has no such repository, or asks who you are (401); {_LOG_IN}",
    403: f"the Hub refuses it (403); {_LOG_IN}",
    404: "the Hub has no such file or revision (404); check the address: hf://ORG/MODEL[@REVISION]/FILE",
}


class HubRanges:
    """Ask the Hub where a file is, and there for ranges; where the answer is no longer valid, ask the Hub again."""

    def __init__(self, address: str) -> None:
        self._first = resolve(address)
        self._token = read_token()
        self._ranges = self._at(self._first)

    def close(self) -> None:
        """Let the connection go."""
        self._ranges.close()

    def fetch(self, start: int, stop: int) -> Piece:
        """Give the bytes from ``start`` to ``stop``, as ``Ranges.fetch`` says."""
        was_moved = self._ranges.address != self._first
        try:
            return self._follow(start, stop)
        except Refused as refused:
            if not was_moved or refused.status != 403:
                raise
        self._move(self._first)  # addresses that the Hub signs are valid for an hour or so
        return self._follow(start, stop)

    def _follow(self, start: int, stop: int, moves: int = _MOST_MOVES) -> Piece:
        try:
            return self._ranges.fetch(start, stop)
        except Refused as refused:
            if refused.target is None or urlsplit(refused.target).scheme != urlsplit(self._first).scheme:
                raise
            if moves == 0:
                raise UnreadableCheckpoint("the Hub sends on and on; try again later") from refused
            self._move(refused.target)
        return self._follow(start, stop, moves - 1)

    def _move(self, address: str) -> None:
        self._ranges.close()
        self._ranges = self._at(address)

    def _at(self, address: str) -> HttpRanges:
        if urlsplit(address).netloc != urlsplit(self._first).netloc:
            return HttpRanges(address)
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        return HttpRanges(address, headers, _REASONS)


def resolve(address: str) -> str:
    """Give the address at which the Hub is asked for a file.

    :raises UnreadableCheckpoint: it names none.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UnreadableCheckpoint("the address names no file on the Hub; write it as hf://ORG/MODEL[@REVISION]/FILE")
    revision = quote(unquote(match["revision"] or "main"), safe="")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{endpoint}/{match['repository']}/resolve/{revision}/{quote(match['file'])}"


def read_token() -> str | None:
    """Give the token that the Hub's own tools would send, None where there is none or it is not to be sent unasked.

    :raises UnreadableCheckpoint: what stands in its place is none.
    """
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return None
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or _stored_token()
    token = token.strip()
    if token and not _TOKEN.fullmatch(token):
        raise UnreadableCheckpoint("the token for the Hub holds what no token does; set HF_TOKEN anew")
    return token or None


def _stored_token() -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    # Not that of Path: it raises where a user has no home.
    path = os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or f"{home}/token")  # noqa: PTH111
    try:
        return Path(path).read_text("utf-8")
    except (OSError, ValueError):
        return ""
