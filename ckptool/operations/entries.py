"""Which entries of a state dict cannot be written: what is no dense array, and tensors inside other values."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptool.errors import UnsupportedTensor
from ckptool.layouts.segments import quoted
from ckptool.model.conversion import OutputKind
from ckptool.model.plans import StateDict
from ckptool.model.values import TensorSpec, opaque_inside, walk

_MAX_OPTIONS = 6  # longer lists of --exclude help nobody


def refuse_unwritable(path: Path, state_dict: StateDict, kept: Mapping[str, str], kind: OutputKind) -> None:
    """Refuse the entries that would lose their tensors; ``kept`` maps their keys to clean names.

    :raises UnsupportedTensor: there is one.
    """
    found = {
        kept[key]: reason
        for key, value in state_dict.entries.items()
        if type(value) is not TensorSpec and key in kept and (reason := unwritable(key, value, kind))
    }
    if found:
        reasons = ", ".join(dict.fromkeys(found.values()))
        raise UnsupportedTensor(f"{path}: {quoted(list(found))}: {reasons}; {_remedy(list(found))}")


def unwritable(key: str, value: Any, kind: OutputKind) -> str:
    """Say why an entry cannot be written; empty where it can, or where it is nothing but an extra state."""
    opaque = opaque_inside(value)
    if opaque is not None:
        return f"{opaque.kind} ({opaque.detail}), which ckptool does not write"
    is_extra = key.endswith("_extra_state")
    if kind == "safetensors" and not is_extra and any(isinstance(node, TensorSpec) for _, node in walk(value)):
        return "holds tensors inside, which a safetensors file cannot, but a .pt file can"
    return ""


def _remedy(names: list[str]) -> str:
    options = " ".join(f"--exclude {shlex.quote(name)}" for name in names[:_MAX_OPTIONS])
    rest = " and so on" if len(names) > _MAX_OPTIONS else ""
    them = "it" if len(names) == 1 else "them"
    return f"save plain tensors where it was made, or leave {them} out with {options}{rest}"
