"""Which entries of a state dict cannot be written: what is no dense array, and tensors inside other values."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptool.errors import UnsupportedTensor
from ckptool.layouts.segments import quoted
from ckptool.model.plans import StateDict
from ckptool.model.values import OpaqueTensor, Stub, TensorSpec, walk
from ckptool.operations.opaque import OpaquePolicy

_MAX_OPTIONS = 6  # longer lists of --exclude help nobody


def refuse_unwritable(path: Path, state_dict: StateDict, kept: Mapping[str, str], policy: OpaquePolicy) -> None:
    """Refuse the entries that would lose their tensors; ``kept`` maps their keys to clean names.

    :raises UnsupportedTensor: there is one.
    """
    found = {
        kept[key]: reason
        for key, value in state_dict.entries.items()
        if type(value) is not TensorSpec and key in kept and (reason := unwritable(key, value, policy))
    }
    if found:
        raise UnsupportedTensor(f"{path}: {_grouped(found)}; {_remedy(list(found))}")


def _grouped(found: Mapping[str, str]) -> str:
    """Say each reason once, after the names that it is for."""
    names: dict[str, list[str]] = {}
    for name, reason in found.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{quoted(those)}: {reason}" for reason, those in names.items())


def unwritable(key: str, value: Any, policy: OpaquePolicy) -> str:
    """Say why an entry cannot be written; empty where it can, or where it is nothing but an extra state."""
    nodes = [node for _, node in walk(value)]
    array = next((node for node in nodes if isinstance(node, Stub) and node.ref.full_name == "numpy.ndarray"), None)
    if array is not None:
        return f"a NumPy array of {_elements(array)}, which no tensor can hold"
    tensors = [node for node in nodes if isinstance(node, TensorSpec | OpaqueTensor)]
    is_extra = key.endswith("_extra_state")
    lost = next((node for node in nodes if isinstance(node, Stub) and _is_lost(node, policy)), None)
    if lost is not None and not is_extra:
        return f"holds tensors inside a pickled {lost.ref.full_name}, which is not written"
    reasons = (policy.refusal(node) for node in tensors if isinstance(node, OpaqueTensor))
    reason = next(filter(None, reasons), "")
    if reason or isinstance(value, OpaqueTensor):
        return reason
    if policy.kind == "safetensors" and tensors and not is_extra:
        return "holds tensors inside, which a safetensors file cannot, but a .pt file can"
    return ""


def _is_lost(stub: Stub, policy: OpaquePolicy) -> bool:
    """Tell whether an object goes, and tensors with it."""
    is_kept = policy.keeps_fields and bool(stub.fields or stub.pairs or stub.items)
    return not is_kept and any(isinstance(node, TensorSpec | OpaqueTensor) for _, node in walk(stub))


_ELEMENTS = {
    "O": "objects", "V": "records", "U": "texts", "S": "texts", "M": "dates", "m": "durations", "f": "long floats",
    "c": "long complex numbers",
}  # fmt: skip


def _elements(array: Stub) -> str:
    """Say what the elements of an array are that is no array of plain numbers; its type is the second argument."""
    dtype = array.args[1] if len(array.args) > 1 else None
    code = dtype.args[0] if isinstance(dtype, Stub) and dtype.args else ""
    return _ELEMENTS.get(str(code).lstrip("<>=|")[:1], "unknown elements")


def _remedy(names: list[str]) -> str:
    options = " ".join(f"--exclude {shlex.quote(name)}" for name in names[:_MAX_OPTIONS])
    rest = " and so on" if len(names) > _MAX_OPTIONS else ""
    them = "it" if len(names) == 1 else "them"
    return f"save plain tensors where it was made, or leave {them} out with {options}{rest}"
