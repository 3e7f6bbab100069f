"""The SHA-256 of whole files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ckptool.errors import UnreadableCheckpoint

_CHUNK_BYTES = 1 << 20


def hash_file(path: Path) -> str:
    """Give the SHA-256 of a file in 64 hexadecimal digits, as ``sha256sum`` does.

    :raises UnreadableCheckpoint: it cannot be read.
    """
    running = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                running.update(chunk)
    except (OSError, ValueError) as error:
        raise UnreadableCheckpoint(f"{path}: cannot be read for its checksum ({error}); look at the file") from error
    return running.hexdigest()
