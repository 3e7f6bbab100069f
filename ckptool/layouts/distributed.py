"""Distributed tensors: which are whole on this rank, and which are one rank's part.

Sources: torch/distributed/tensor/_api.py (``DTensor.__tensor_flatten__``), torch/distributed/device_mesh.py,
torch/distributed/_shard/sharded_tensor/api.py (``ShardedTensor.__getstate__``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptool.model.values import DictNode, OpaqueTensor, Stub, TensorSpec

_KINDS = frozenset({"dtensor", "sharded"})
_MOST_RANKS = 1 << 20
_RANK_LISTS = ("_flatten_rank_map", "_flatten_mesh_list")
_RANK_TENSORS = ("_rank_map", "mesh", "_mesh")


@dataclass(frozen=True, slots=True)
class Share:
    """Say which part of a distributed tensor a file holds; ``rank`` is None and ``ranks`` empty where it does not say.

    ``placements`` are those of a DTensor (``Shard(0)``, ``Replicate()``), ``local_shapes`` the shapes of the parts.
    """

    rank: int | None
    ranks: tuple[int, ...]
    placements: tuple[str, ...]
    local_shapes: tuple[tuple[int, ...], ...]


def whole_tensors(entries: dict[str, Any]) -> dict[str, Any]:
    """Give distributed tensors that are all on this rank as the plain tensors that they are."""
    return {key: whole_tensor(value) for key, value in entries.items()} if holds_opaque(entries) else entries


def holds_opaque(entries: Mapping[str, Any]) -> bool:
    """Tell whether one of the values is a tensor, but no dense array."""
    return OpaqueTensor in set(map(type, entries.values()))


def whole_tensor(value: Any) -> Any:
    """Give the local tensor of a distributed one where it has the shape of the whole; else the value itself.

    With a ``Partial`` placement the local tensor is one term of a sum: all of it only where there is one rank.
    """
    if not isinstance(value, OpaqueTensor) or value.kind not in _KINDS:
        return value
    is_term = any(placement.ref.name in ("Partial", "_Partial") for placement in _placements(value))
    if is_term and len(share_of(value).ranks) != 1:
        return value
    return next((part for part in local_parts(value) if part.shape == value.shape), value)


def is_shard(value: Any) -> bool:
    """Tell whether a distributed tensor holds only a part of itself."""
    return isinstance(value, OpaqueTensor) and value.kind in _KINDS and whole_tensor(value) is value


def share_of(value: OpaqueTensor) -> Share:
    """Read which part of a distributed tensor is here."""
    rank, ranks = _sharded_ranks(value) if value.kind == "sharded" else _mesh_ranks(value)
    shapes = tuple(part.shape for part in local_parts(value))
    return Share(rank, ranks, tuple(map(_placement, _placements(value))), shapes)


def share_text(value: OpaqueTensor) -> str:
    """Say in a few words which part is here and which ranks have the rest; empty where the file does not tell."""
    share = share_of(value)
    if share.rank is None or not share.ranks:
        return ""
    others = [str(rank) for rank in share.ranks if rank != share.rank]
    shown = ", ".join(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
    shapes = " and ".join(str(list(shape)) for shape in share.local_shapes) or "nothing"
    split = f", {', '.join(share.placements)}" if share.placements else ""
    word = "rank" if len(others) == 1 else "ranks"
    return f"rank {share.rank} has {shapes} of {list(value.shape or ())}{split}; the rest is on {word} {shown}"


def local_parts(value: OpaqueTensor) -> list[TensorSpec]:
    """Give the parts of a ShardedTensor that are here, the local tensor of a DTensor; of another kind, nothing."""
    if value.kind == "dtensor":
        return [part for _, part in value.parts if isinstance(part, TensorSpec)]
    if value.kind != "sharded":
        return []
    tensors = [_field(shard, "tensor") for shard in _sharded_state(value)[0]]
    return [tensor for tensor in tensors if isinstance(tensor, TensorSpec)]


def _field(value: Any, name: str) -> Any:
    fields = value.fields if isinstance(value, Stub) else None
    return None if fields is None else fields.get(name)


def _spec_of(value: OpaqueTensor) -> Any:
    return next((part for _, part in value.parts if isinstance(part, Stub) and part.ref.name == "DTensorSpec"), None)


def _mesh_ranks(value: OpaqueTensor) -> tuple[int | None, tuple[int, ...]]:
    mesh = _field(_spec_of(value), "mesh")
    rank = _field(mesh, "_rank")
    listed = [found for name in _RANK_LISTS if isinstance(found := _field(mesh, name), tuple | list)]
    counted = [found.numel for name in _RANK_TENSORS if isinstance(found := _field(mesh, name), TensorSpec)]
    ranks = _integers(listed[0]) if listed else tuple(range(counted[0])) if counted and counted[0] < _MOST_RANKS else ()
    return rank if type(rank) is int else None, ranks


def _sharded_ranks(value: OpaqueTensor) -> tuple[int | None, tuple[int, ...]]:
    """Read the ranks of all parts from the metadata, and this one's from a part that is here."""
    local, metadata = _sharded_state(value)
    shards = _field(metadata, "shards_metadata")
    ranks = [_shard_rank(shard) for shard in shards] if isinstance(shards, list) else []
    own = next(iter(_integers([_shard_rank(_field(shard, "metadata")) for shard in local])), None)
    return own, tuple(dict.fromkeys(_integers(ranks)))


def _sharded_state(value: OpaqueTensor) -> tuple[list[Any], Any]:
    """Give the parts that are here, and the metadata of all."""
    state = next((part for _, part in value.parts if isinstance(part, tuple) and len(part) >= 2), ([], None))
    return state[0] if isinstance(state[0], list) else [], state[1]


def _shard_rank(metadata: Any) -> Any:
    return _field(_field(metadata, "placement"), "_rank")


def _placements(value: OpaqueTensor) -> list[Stub]:
    found = _field(_spec_of(value), "placements")
    return [stub for stub in found if isinstance(stub, Stub)] if isinstance(found, tuple | list) else []


def _placement(stub: Stub) -> str:
    fields = stub.fields or DictNode()
    return f"{stub.ref.name}({', '.join(str(field) for _, field in fields.pairs if type(field) in (int, str))})"


def _integers(values: Any) -> tuple[int, ...]:
    return tuple(value for value in values if type(value) is int)
