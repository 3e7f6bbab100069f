"""Programs with their weights: TorchScript and ``torch.export`` archives, which run code as soon as they are loaded."""

from __future__ import annotations

import inspect
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn

from ckptool.errors import CkptoolError
from ckptool.loading.built import BuiltModel
from ckptool.loading.foreign import foreign_code
from ckptool.loading.hints import input_hint

ArchiveKind = Literal["TorchScript archive", "torch.export archive"]

# Sources: torch/csrc/jit/serialization (constants.pkl), torch/export/pt2_archive/constants.py (archive_format).
_MARKS: tuple[tuple[re.Pattern[str], ArchiveKind], ...] = (
    (re.compile(r"^[^/]+/constants\.pkl$"), "TorchScript archive"),
    (re.compile(r"^[^/]+/archive_format$|(?:^|/)serialized_exported_program\.json$"), "torch.export archive"),
)


def archive_kind(path: Path) -> ArchiveKind | None:
    """Say which kind of program a file holds; None where it holds none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return None
    return next((kind for pattern, kind in _MARKS if any(pattern.search(name) for name in names)), None)


def build_archive(path: Path, *, trust_code: bool) -> BuiltModel:
    """Load a program as it is.

    :raises CkptoolError: it is none, it cannot be loaded, or its code is not trusted.
    """
    kind = archive_kind(path)
    if kind is None:
        raise CkptoolError(f"{path}: this is no TorchScript or .pt2 archive; name the code of the model with --model")
    if not trust_code:
        raise CkptoolError(f"{path}: this is a {kind}, loading it runs its code; allow that with --trust-code")
    load = _LOADERS[kind]
    model, inputs, keywords = load(path)
    return BuiltModel(
        description=f"{path} ({kind})",
        make=lambda _seed: load(path)[0],
        input_hint=input_hint(model),
        example_inputs=inputs,
        example_keywords=keywords,
    )


_Loaded = tuple[nn.Module, "tuple[Any, ...] | None", dict[str, Any]]


def _load_script(path: Path) -> _Loaded:
    with foreign_code(f"{path}: torch.jit.load failed", "export it again with this version of torch"):
        model: nn.Module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    return model, None, {}


def _load_export(path: Path) -> _Loaded:
    with foreign_code(f"{path}: torch.export.load failed", "export it again with this version of torch"):
        program = torch.export.load(str(path))
        model = program.module()
        inputs, keywords = program.example_inputs or (None, {})
    # An exported program knows one mode, and raises where others are switched.
    for name in ("eval", "train"):
        setattr(model, name, MethodType(_itself, model))
    if inputs is not None:
        _take_names(model, len(inputs))
    return model, inputs, dict(keywords)


def _take_names(model: nn.Module, by_place: int) -> None:
    """Let arguments be given by place or by name: an exported program takes them only as it was traced."""
    names = tuple(inspect.signature(model.forward).parameters)
    places = names[:by_place]

    def arrange(_model: nn.Module, values: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        given = {**dict(zip(names, values, strict=False)), **keywords}
        if len(given) != len(values) + len(keywords) or not given.keys() >= set(places):
            return values, keywords
        return tuple(given.pop(name) for name in places), given

    model.register_forward_pre_hook(arrange, with_kwargs=True, prepend=True)


def _itself(model: nn.Module, _mode: bool = True) -> nn.Module:
    return model


_LOADERS: dict[ArchiveKind, Callable[[Path], _Loaded]] = {
    "TorchScript archive": _load_script,
    "torch.export archive": _load_export,
}
