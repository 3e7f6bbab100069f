"""Compare values that may hold tensors: plain parts as plain values, tensors by their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptool.model.sources import Progress
from ckptool.model.values import OpaqueTensor, TensorSpec, walk
from ckptool.operations.plain import to_plain
from ckptool.operations.runs import same_bytes
from ckptool.operations.transforms import payload_of


def values_differ(a: Any, b: Any, progress: Progress) -> bool:
    """Tell whether two value trees differ anywhere, the bytes of their tensors included.

    :raises UnsupportedTensor: a tensor expands far beyond its storage.
    :raises UnreadableCheckpoint: bytes cannot be read, or do not match their checksum.
    """
    return _outline(a) != _outline(b) or bool(differing_tensors(a, b, progress))


def differing_tensors(a: Any, b: Any, progress: Progress) -> list[str]:
    """List the places (``.optimizer.weights[0]``) where both trees hold a dense tensor of one kind with other bytes."""
    ours, theirs = _dense_inside(a), _dense_inside(b)
    return [
        path
        for path, spec in ours.items()
        if path in theirs
        and (spec.dtype, spec.shape) == (theirs[path].dtype, theirs[path].shape)
        and not same_bytes(payload_of(spec, key=path), payload_of(theirs[path], key=path), progress)
    ]


def _outline(value: Any) -> list[Any]:
    """Give all that is no tensor, and what kinds of tensors there are."""
    opaque = [(path, node) for path, node in walk(value) if isinstance(node, OpaqueTensor)]
    described = [
        (path, node.kind, node.detail, [(name, to_plain(part)) for name, part in node.parts]) for path, node in opaque
    ]
    return [to_plain(value), described]


def _dense_inside(value: Any) -> Mapping[str, TensorSpec]:
    return {"".join(path): node for path, node in walk(value) if isinstance(node, TensorSpec)}
