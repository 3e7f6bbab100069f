"""Read a staged file again and hold it against its plan, before anyone can see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.shards import INDEX_CONTRADICTIONS
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.checksums import crc32
from ckptool.model.copies import CopyPlan, Payload, PlannedOpaque, PlannedTensor
from ckptool.model.sources import Progress
from ckptool.model.values import DictNode, OpaqueTensor, SetNode, TensorSpec


def check_staged(
    staged: Checkpoint, plan: CopyPlan, checksums: Mapping[Payload, int], progress: Progress
) -> dict[PlannedTensor, TensorSpec]:
    """Compare names, dtypes, shapes, plain values and the checksum of every tensor with what was meant.

    Give what each planned tensor has become.

    :raises UnreadableCheckpoint: the file on disk is not what was written.
    """
    expected = DictNode(list(plan.tensors.items())) if plan.root is None else plan.root
    found: dict[PlannedTensor, TensorSpec] = {}
    checked: set[Payload] = set()
    for path, planned, spec in _tensor_pairs(staged, expected):
        found[planned] = spec
        if planned.payload not in checked:
            checked.add(planned.payload)
            if _checksum(spec, progress) != checksums[planned.payload]:
                raise _differs(staged, path, "other bytes")
    return found


def check_index(staged: Checkpoint) -> None:
    """Make sure that a staged index says what is in its shards: opening it has compared them already.

    :raises UnreadableCheckpoint: it does not.
    """
    found = [finding.text for finding in staged.findings if finding.code in INDEX_CONTRADICTIONS]
    if found:
        raise _differs(staged, "the index", f"({found[0]}) another content")


def _tensor_pairs(staged: Checkpoint, expected: Any) -> Iterator[tuple[str, PlannedTensor, TensorSpec]]:
    """Walk both trees side by side; yield where tensors stand, refuse whatever differs."""
    pending: list[tuple[str, Any, Any]] = [("", expected, staged.root)]
    seen: set[tuple[int, int]] = set()
    while pending:
        path, meant, found = pending.pop()
        if isinstance(meant, PlannedTensor):
            if not isinstance(found, TensorSpec) or (meant.dtype, meant.shape) != (found.dtype, found.shape):
                raise _differs(staged, path, "another dtype or shape")
            yield path, meant, found
        elif isinstance(meant, PlannedOpaque):
            if not isinstance(found, OpaqueTensor) or _identity(meant) != _identity(found):
                raise _differs(staged, path, "another kind, dtype or shape")
            pending.extend((f"{path}.{name}", *pair) for name, *pair in _part_pairs(meant, found))
        elif isinstance(meant, DictNode | SetNode | list | tuple):
            if (id(meant), id(found)) not in seen:
                seen.add((id(meant), id(found)))
                pending.extend(_child_pairs(staged, path, meant, found))
        elif type(meant) is not type(found) or repr(meant) != repr(found):  # repr: NaN is itself, -0.0 is not 0.0
            raise _differs(staged, path, "another value")


def _identity(tensor: PlannedOpaque | OpaqueTensor) -> tuple[Any, ...]:
    return tensor.kind, tensor.detail, tensor.dtype, tensor.shape, [name for name, _ in tensor.parts]


def _part_pairs(meant: PlannedOpaque, found: OpaqueTensor) -> Iterator[tuple[str, Any, Any]]:
    return ((name, part, other) for (name, part), (_, other) in zip(meant.parts, found.parts, strict=True))


def _child_pairs(staged: Checkpoint, path: str, meant: Any, found: Any) -> Iterator[tuple[str, Any, Any]]:
    if type(meant) is not type(found) or len(_parts(meant)) != len(_parts(found)):
        raise _differs(staged, path, "other contents")
    if isinstance(meant, DictNode) and staged.format == "safetensors":
        by_name = found.text_items()
        return ((key, value, by_name.get(key)) for key, value in meant.pairs)
    return ((f"{path}[{index}]", *pair) for index, pair in enumerate(zip(_parts(meant), _parts(found), strict=True)))


def _parts(value: Any) -> list[Any]:
    if isinstance(value, DictNode):
        parts: list[Any] = [part for pair in value.pairs for part in pair]
        return parts if value.attributes is None else [*parts, value.attributes]
    return list(value.items if isinstance(value, SetNode) else value)


def _checksum(spec: TensorSpec, progress: Progress) -> int:
    value = 0
    for chunk in spec.storage.source.stream():
        value = crc32(chunk, value)
        progress.advance(len(chunk))
    return value


def _differs(staged: Checkpoint, path: str, what: str) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(
        f"{staged.path}: read back, {path or 'the content'} has {what} than what was written; "
        "nothing was published: check the disk and try again"
    )
