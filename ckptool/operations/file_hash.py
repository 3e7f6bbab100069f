"""The SHA-256 of whole files."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.file import open_file
from ckptool.model.manifest import HashedFile
from ckptool.model.sources import NoProgress, Progress


def hash_file(path: Path, progress: Progress | None = None) -> HashedFile:
    """Give the size and the SHA-256 of a file, as ``sha256sum`` does.

    :raises UnreadableCheckpoint: it cannot be read.
    """
    running, progress = hashlib.sha256(), progress or NoProgress()
    try:
        with closing(open_file(path)) as file:
            for chunk in file.stream(0, file.size):
                running.update(chunk)
                progress.advance(len(chunk))
            return HashedFile(path.name, file.size, running.hexdigest())
    except UnreadableCheckpoint as error:
        raise UnreadableCheckpoint(f"{path}: {error}") from error
