"""How torch's own functions are called to rebuild tensors that are no dense arrays.

Source: torch/_tensor.py (``_reduce_ex_internal``) and torch/_utils.py of torch 2.13.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ckptool.errors import OutputRefused
from ckptool.model.copies import PlannedOpaque
from ckptool.model.values import row_major


@dataclass(frozen=True, slots=True)
class Name:
    """Refer to something by its name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Hold the items of a tuple that occurs once."""

    items: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Call a function by its name."""

    module: str
    name: str
    args: tuple[Any, ...] = ()


_LAYOUTS = {name: f"torch.sparse_{name.lower()}" for name in ("COO", "CSR", "CSC", "BSR", "BSC")}


def rebuild(tensor: PlannedOpaque) -> Call:
    """Say which call makes the tensor; its arguments are plain values, planned tensors, payloads and the like.

    :raises OutputRefused: there is no call for its kind.
    """
    make = _REBUILDS.get(tensor.kind)
    if make is None:
        raise OutputRefused(f"a {tensor.kind} tensor cannot be written; leave it out with --exclude")
    return make(tensor)


def _rebuild_sparse(tensor: PlannedOpaque) -> Call:
    layout = Call("torch.serialization", "_get_layout", (_LAYOUTS[tensor.detail],))
    tensors = [part for name, part in tensor.parts if name != "is_coalesced"]
    flags = [part for name, part in tensor.parts if name == "is_coalesced"]
    return Call(
        "torch._utils", "_rebuild_sparse_tensor", (layout, Group((*tensors, Group(tensor.shape or ()), *flags)))
    )


def _rebuild_quantized(tensor: PlannedOpaque) -> Call:
    parts = dict(tensor.parts)
    shape = parts.pop("data").shape
    quantizer = Group((Name("torch", tensor.detail), *parts.values()))
    place = (dict(tensor.parts)["data"].payload, 0, Group(shape), Group(row_major(shape)))
    return Call("torch._utils", "_rebuild_qtensor", (*place, quantizer, False, Call("collections", "OrderedDict")))


def _rebuild_nested(tensor: PlannedOpaque) -> Call:
    return Call("torch._utils", "_rebuild_nested_tensor", tuple(part for _, part in tensor.parts))


_REBUILDS: dict[str, Callable[[PlannedOpaque], Call]] = {
    "sparse": _rebuild_sparse,
    "quantized": _rebuild_quantized,
    "nested": _rebuild_nested,
}
