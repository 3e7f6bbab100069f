"""One number for all values of a set of tensors, whatever container holds them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ckptool.model.sources import Progress
from ckptool.model.values import TensorSpec
from ckptool.operations.transforms import payload_of


def digest(tensors: Mapping[str, TensorSpec]) -> str:
    """Give ``sha256:`` and 64 hexadecimal digits: equal for the same names, dtypes, shapes and values.

    The digest of a tensor is SHA-256 over the text ``DTYPE SHAPE\\n`` (``float32 2,3``; nothing after the space for no
    dimensions; torch's names and shapes) followed by its bytes, row-major and little-endian. The digest of the whole is
    SHA-256 over one line per name, sorted by UTF-8: the tensor's digest in hexadecimal, a space, the length of the name
    in bytes, a space, the name, a newline.

    :raises UnreadableCheckpoint: bytes cannot be read.
    :raises UnsupportedTensor: a view expands far beyond its storage.
    """
    return combine_digests(tensor_digests(tensors))


def tensor_digests(tensors: Mapping[str, TensorSpec], progress: Progress | None = None) -> dict[str, str]:
    """Give the digest of each tensor in 64 hexadecimal digits.

    :raises UnreadableCheckpoint: bytes cannot be read.
    :raises UnsupportedTensor: a view expands far beyond its storage.
    """
    known: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, spec in tensors.items():
        found[name] = _tensor_digest(name, spec, known)
        if progress is not None:
            progress.advance(spec.nbytes)
    return found


def combine_digests(digests: Mapping[str, str]) -> str:
    """Give the digest of all tensors from the digest of each."""
    total = hashlib.sha256()
    for name, hexadecimal in sorted((_encode(name), hexadecimal) for name, hexadecimal in digests.items()):
        total.update(b"%s %d %s\n" % (hexadecimal.encode(), len(name), name))
    return f"sha256:{total.hexdigest()}"


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def _tensor_digest(name: str, spec: TensorSpec, known: dict[tuple[Any, ...], str]) -> str:
    """Read each view once, however many names it has."""
    if spec.view_key not in known:
        running = hashlib.sha256(f"{spec.dtype.name} {','.join(map(str, spec.shape))}\n".encode())
        for extent in payload_of(spec, key=name).extents:
            for chunk in extent.source.stream(extent.offset, extent.nbytes):
                running.update(chunk)
        known[spec.view_key] = running.hexdigest()
    return known[spec.view_key]
