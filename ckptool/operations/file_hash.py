"""The SHA-256 of whole files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ckptool.errors import UnreadableCheckpoint
from ckptool.model.manifest import HashedFile
from ckptool.model.sources import NoProgress, Progress

_CHUNK_BYTES = 1 << 20


def hash_file(path: Path, progress: Progress | None = None) -> HashedFile:
    """Give the size and the SHA-256 of a file, as ``sha256sum`` does.

    :raises UnreadableCheckpoint: it cannot be read.
    """
    running, nbytes, progress = hashlib.sha256(), 0, progress or NoProgress()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                running.update(chunk)
                nbytes += len(chunk)
                progress.advance(len(chunk))
    except (OSError, ValueError) as error:
        raise UnreadableCheckpoint(f"{path}: cannot be read for its checksum ({error}); look at the file") from error
    return HashedFile(path.name, nbytes, running.hexdigest())
