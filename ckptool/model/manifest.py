"""What a manifest says of a checkpoint: its files, its tensors, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MANIFEST_SCHEMA = "ckptool.manifest/1"


@dataclass(frozen=True, slots=True)
class HashedFile:
    """Name one file without its folder, its size in bytes and its SHA-256 in 64 hexadecimal digits."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class HashedTensor:
    """Describe one tensor.

    ``shape`` is None where it is not known. ``sha256`` is that of the text ``DTYPE SHAPE\\n`` and its bytes, as in the
    digest of all tensors; None for what is no dense array.
    """

    dtype: str
    shape: tuple[int, ...] | None
    nbytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Describe the files of one checkpoint, and the tensors of its state dict ``weights`` by the names in the file.

    ``digest`` is that of all tensors, None where one of them is no dense array.
    """

    files: tuple[HashedFile, ...]
    weights: str
    tensors: Mapping[str, HashedTensor]
    digest: str | None
