"""A manifest: what a written checkpoint holds, where that comes from, and what was left behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptool.model.conversion import Conversion
from ckptool.model.manifest import MANIFEST_SCHEMA, HashedFile, HashedTensor, Manifest
from ckptool.reports.conversion import document
from ckptool.reports.json import to_json

_OF_CONVERSION = (
    *("format", "already_clean", "certainty", "wrappers", "map", "dropped", "flattened", "made_dense", "ties"),
    "casts",
)


def write_manifest(manifest: Manifest, source: Sequence[HashedFile], conversion: Conversion, version: str) -> str:
    """Write the JSON document: no folders, no times, so that the same input gives the same manifest.

    ``source`` are the files that were read, ``version`` is that of ckptool.
    """
    done = document(conversion)
    return to_json({
        "schema": MANIFEST_SCHEMA,
        "ckptool": version,
        "weights": manifest.weights,
        "files": _files(manifest.files),
        "digest": manifest.digest,
        "tensors": [_tensor(name, tensor) for name, tensor in manifest.tensors.items()],
        "source": {"files": _files(source), "state_dict": done["state_dict"]},
        **{name: done[name] for name in _OF_CONVERSION},
    })  # fmt: skip


def _files(files: Iterable[HashedFile]) -> list[Mapping[str, Any]]:
    return [{"name": file.name, "bytes": file.nbytes, "sha256": file.sha256} for file in files]


def _tensor(name: str, tensor: HashedTensor) -> Mapping[str, Any]:
    shape = None if tensor.shape is None else list(tensor.shape)
    return {"name": name, "dtype": tensor.dtype, "shape": shape, "bytes": tensor.nbytes, "sha256": tensor.sha256}
