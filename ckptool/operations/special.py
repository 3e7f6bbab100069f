"""Say what each tensor that is no dense array holds, without reading its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckptool.layouts import local_parts, share_of
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.inspection import PartRow, SpecialTensor
from ckptool.model.plans import KeyPlan, Selection
from ckptool.model.values import OpaqueTensor, TensorSpec, stored_bytes, walk

Facts = dict[str, Any]


def special_tensors(checkpoint: Checkpoint, selection: Selection, plan: KeyPlan | None) -> tuple[SpecialTensor, ...]:
    """Describe those of the chosen state dict; where none is chosen, all of the file by their places."""
    chosen = selection.chosen
    if chosen is None:
        return tuple(
            _describe(path.removeprefix("."), path.removeprefix("."), at) for path, at in _opaque(checkpoint.root)
        )
    if not any(note.code == "not-dense" for note in selection.notes):
        return ()
    names: Mapping[str, str | None] = {} if plan is None else {move.source: move.target for move in plan.moves}
    return tuple(
        _describe(None if (name := names.get(key, key)) is None else name + path, key + path, tensor)
        for key, value in chosen.entries.items()
        if type(value) is not TensorSpec
        for path, tensor in _opaque(value)
    )


def _opaque(root: Any) -> Iterator[tuple[str, OpaqueTensor]]:
    """Yield the outermost ones in a value, with the steps that lead there."""
    covered: set[int] = set()
    for path, node in walk(root):
        if isinstance(node, OpaqueTensor):
            if id(node) not in covered:
                yield "".join(path), node
            covered.update(id(part) for _, part in node.parts)


def _describe(key: str | None, source_key: str, tensor: OpaqueTensor) -> SpecialTensor:
    facts = _FACTS.get(tensor.kind)
    parts = _parts(tensor)
    return SpecialTensor(
        key=key,
        source_key=source_key,
        kind=tensor.kind,
        detail=tensor.detail,
        dtype=None if tensor.dtype is None else tensor.dtype.name,
        shape=tensor.shape,
        nbytes=sum(part.nbytes for part in parts),
        facts={} if facts is None else facts(tensor),
        parts=parts,
    )


def _parts(tensor: OpaqueTensor) -> tuple[PartRow, ...]:
    """List every dense part once, under the first name that it has; of a tensor inside, its parts."""
    rows: dict[tuple[Any, ...], PartRow] = {}
    for name, part in [*tensor.parts, *((f"shard.{index}", spec) for index, spec in enumerate(local_parts(tensor)))]:
        if isinstance(part, TensorSpec):
            rows.setdefault(part.view_key, PartRow(name, part.dtype.name, part.shape, stored_bytes(part)))
        elif isinstance(part, OpaqueTensor):
            rows[(id(part),)] = PartRow(name, _name(part), part.shape or (), part.nbytes)
    return tuple(rows.values())


def _name(tensor: OpaqueTensor) -> str:
    return " ".join(filter(None, (tensor.kind, tensor.detail, tensor.dtype.name if tensor.dtype else "")))


def _sparse(tensor: OpaqueTensor) -> Facts:
    parts = dict(tensor.parts)
    indices: TensorSpec = tensor.parts[0 if tensor.detail == "COO" else 1][1]
    stored = math.prod(indices.shape[1:]) if tensor.detail == "COO" else indices.numel
    values: TensorSpec = parts["values"]
    facts: Facts = {"stored": stored, "index_dtype": indices.dtype.name}
    elements = math.prod(tensor.shape or ())
    if elements:
        facts["density"] = values.numel / elements
    if tensor.detail in ("BSR", "BSC"):
        batch = len(indices.shape) - 1
        facts["block"] = list(values.shape[batch + 1 : batch + 3])
    if "is_coalesced" in parts:
        facts["coalesced"] = parts["is_coalesced"]
    return facts


def _quantized(tensor: OpaqueTensor) -> Facts:
    parts = dict(tensor.parts)
    if "scale" in parts:
        return {"scale": parts["scale"], "zero_point": parts["zero_point"]}
    return {"axis": parts["axis"], "channels": _length(parts["scales"])}


def _length(value: Any) -> int:
    return value.numel if isinstance(value, TensorSpec) else len(value)


def _nested(tensor: OpaqueTensor) -> Facts:
    parts = dict(tensor.parts)
    sizes, offsets = parts.get("sizes"), parts.get("offsets")
    if isinstance(sizes, TensorSpec) and sizes.shape:
        return {"tensors": sizes.shape[0]}
    return {"tensors": max(offsets.numel - 1, 0)} if isinstance(offsets, TensorSpec) else {}


def _distributed(tensor: OpaqueTensor) -> Facts:
    share = share_of(tensor)
    facts: Facts = {"rank": share.rank, "ranks": list(share.ranks), "placements": list(share.placements)}
    return {**facts, "local_shapes": [list(shape) for shape in share.local_shapes]}


_FACTS: Mapping[str, Callable[[OpaqueTensor], Facts]] = {
    "sparse": _sparse,
    "quantized": _quantized,
    "nested": _nested,
    "dtensor": _distributed,
    "sharded": _distributed,
}
