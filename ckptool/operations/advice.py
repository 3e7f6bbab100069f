"""Say which command to run next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from ckptool.model.checkpoint import Checkpoint
from ckptool.model.inspection import KeySummary, NextStep, Safety
from ckptool.model.places import RemotePath
from ckptool.model.plans import Selection
from ckptool.model.values import OpaqueTensor, TensorSpec

CHECKPOINT_SUFFIXES = frozenset(
    {".pt", ".pth", ".ckpt", ".bin", ".th", ".tar", ".pyth", ".pkl", ".model", ".safetensors"}
)
# What tensors are read from and never written to.
_OTHER_SUFFIXES = frozenset({".npz", ".npy", ".pt2", ".ptl", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".nemo"})


def next_step(checkpoint: Checkpoint, selection: Selection, keys: KeySummary, safety: Safety) -> NextStep:
    """Pick the one command that brings a user further, written for a shell."""
    path = checkpoint.path
    if selection.chosen is None:
        return _choose(path, selection)
    if keys.refusal is not None:
        return NextStep(f"ckptool inspect --tree {_quoted(path)}", "see the groups of keys, then choose one")
    special = {key: value for key, value in selection.chosen.entries.items() if type(value) is not TensorSpec}
    whole = _whole(checkpoint)
    return (_settle(path, whole, special) if special else None) or _write(checkpoint, whole, keys, safety)


def _settle(path: Path, whole: Path, special: Mapping[str, Any]) -> NextStep | None:
    """Make sparse and quantized tensors dense where that is all that is needed; None where all can be written."""
    # Few files hold any: what decides about them would slow the start for all others.
    from ckptool.operations.entries import unwritable
    from ckptool.operations.opaque import OPTIONS, OpaquePolicy

    def is_refused(policy: OpaquePolicy) -> bool:
        return any(unwritable(key, value, policy) for key, value in special.items())

    if not is_refused(OpaquePolicy()):
        return None
    if is_refused(OpaquePolicy(densify=True, dequantize=True)):
        return NextStep(f"ckptool inspect --tensors {_quoted(path)}", "see which tensors are no plain arrays")
    kinds = {value.kind for value in special.values() if isinstance(value, OpaqueTensor)}
    options = " ".join(option for kind, option in OPTIONS.items() if kind in kinds)
    target = whole.with_name(f"{_stem(whole)}-dense.safetensors")
    return _run(f"convert {options}", path, target, "write them as dense tensors")


def _write(checkpoint: Checkpoint, whole: Path, keys: KeySummary, safety: Safety) -> NextStep:
    path = checkpoint.path
    if not keys.already_clean:
        stem = _stem(whole)
        suffix = whole.name.removeprefix(stem) if whole.suffix.lower() not in _OTHER_SUFFIXES else ".pt"
        target = whole.with_name(f"{stem}-clean{suffix}")
        return _run("strip-prefixes", path, target, "write the weights under clean names")
    if not checkpoint.is_safetensors:
        reason = "leave the pickle behind" if safety.verdict != "clean" else "write one small, safe file"
        return _run("convert", path, whole.with_name(f"{_stem(whole)}.safetensors"), reason)
    return NextStep(f"ckptool inspect --stats {_quoted(path)}", "read the values: is anything not finite or all zero?")


def _whole(checkpoint: Checkpoint) -> Path:
    """Give the path that the name of an output is made of: outside an archive, of the folder where an index was named.

    It has a name, also where the user's path is a mere dot.
    """
    path = checkpoint.path
    if isinstance(path, RemotePath):
        index = checkpoint.facts["index"] if checkpoint.shards else None
        return Path(path.parent.name if path.name == index else path.name)
    if "inside" in checkpoint.facts:
        return _outside(path).with_name(path.name)
    if checkpoint.shards and path.name == checkpoint.facts["index"]:
        path = path.parent
    return path.resolve() if path.name in ("", "..") else path


def _choose(path: PurePath, selection: Selection) -> NextStep:
    if not selection.candidates:
        return NextStep(f"ckptool inspect --tensors {_quoted(path)}", "see what the file holds instead of weights")
    if selection.refusal is not None and selection.refusal.code == "sharded":
        return NextStep(f"ckptool inspect --tensors {_quoted(path)}", "see what the shard holds")
    name = shell_quote(selection.candidates[0].name)
    return NextStep(f"ckptool inspect --weights {name} {_quoted(path)}", "look at one of the state dicts")


def _run(command: str, source: PurePath, target: PurePath, reason: str) -> NextStep:
    return NextStep(f"ckptool {command} {_quoted(source)} {_quoted(target)}", reason)


def _outside(path: Path) -> Path:
    """Give the archive that a path may lead into."""
    return next((part for part in (path, *path.parents) if part.is_file()), path)


def _stem(path: PurePath) -> str:
    """Cut known suffixes off (``.pth.tar``), and nothing else: ``model-v1.2`` has none."""
    while path.suffix.lower() in CHECKPOINT_SUFFIXES | _OTHER_SUFFIXES:
        path = path.with_suffix("")
    return path.name


def _quoted(path: PurePath) -> str:
    text = str(path)
    # A name that starts with a dash would be read as an option.
    return shell_quote(f"./{text}" if text.startswith("-") else text)


def shell_quote(text: str) -> str:
    """Quote one word for a shell; what is not printable is spelled out, as bash and zsh read it (``$'...'``)."""
    if text.isprintable():
        return shlex.quote(text)
    return "$'" + "".join(map(_spell, text)) + "'"


def _spell(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    # A byte of a file name that is no UTF-8 is a surrogate of this range (PEP 383).
    errors = "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", errors))
