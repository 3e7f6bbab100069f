"""A TorchScript archive of torch 1.0 and 1.1: one table in JSON instead of pickled modules.

``model.json`` is the message ``ModelDef`` of caffe2/proto/torch.proto as protobuf spells it in JSON (names in camel
case, 64-bit integers as text); its tensors lie in records of their own
(torch/csrc/jit/serialization/import_legacy.cpp). torch itself no longer reads these archives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ckptool.errors import AGAIN, UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.json_tables import read_json
from ckptool.formats.pickle import PickledStorage, view_tensor
from ckptool.formats.sources import read_bytes
from ckptool.formats.torch_zip import find_root, storage_findings
from ckptool.formats.torchscript import Weights
from ckptool.formats.zip import Archive, Record
from ckptool.model.checkpoint import Checkpoint, Finding
from ckptool.model.dtypes import BY_NAME, DType
from ckptool.model.values import Storage, TensorSpec

_LARGEST_TABLE = 64 << 20
_MOST_MODULES = 1_000_000
_DEEPEST = 200

# caffe2/proto/caffe2.proto, TensorProto.DataType
_DTYPES = {
    "FLOAT": "float32", "INT32": "int32", "BOOL": "bool", "UINT8": "uint8", "INT8": "int8", "INT16": "int16",
    "INT64": "int64", "FLOAT16": "float16", "DOUBLE": "float64",
}  # fmt: skip
_INTEGER = re.compile(r"-?\d{1,19}")


@dataclass
class _Program:
    """Hold one archive while it is read; ``unnamed`` are the tensors that no module has named yet."""

    file: InputFile
    records: dict[str, Record]
    root: str
    storages: dict[str, tuple[Storage, DType]] = field(default_factory=dict)
    tensors: list[TensorSpec] = field(default_factory=list)
    unnamed: dict[int, TensorSpec] = field(default_factory=dict)


def read_old_torchscript(file: InputFile, archive: Archive) -> Checkpoint:
    """Describe the tensors of a program; its code is not run, no storage is read.

    :raises UnreadableCheckpoint: it is damaged or contradicts itself.
    """
    program = _Program(file, archive.records, find_root(archive.records))
    model = _read_model(program)
    program.tensors = [_read_tensor(program, number, entry) for number, entry in enumerate(_list(model, "tensors"))]
    program.unnamed = dict(enumerate(program.tensors))
    weights = _collect(program, _table(model.get("mainModule")))
    used = [storage for storage, _ in program.storages.values()]
    version = model.get("producerVersion")
    found = Finding("program", "this is a program of TorchScript, which torch.jit.load would prepare to run")
    return Checkpoint(
        path=file.path,
        format="torchscript",
        file_bytes=file.size,
        root=weights.as_root(list(program.unnamed.values())),
        file=file,
        storages=tuple(used),
        findings=(*archive.findings, found, *storage_findings(used, [])),
        facts={"torch_version": version} if type(version) is str else {},
    )


def _read_model(program: _Program) -> dict[str, Any]:
    record = program.records[f"{program.root}/model.json"]
    if record.nbytes > _LARGEST_TABLE:
        raise _bad(f"its table declares {record.nbytes:,} bytes")
    data = read_bytes(record.open(program.file))
    try:
        return _table(read_json(data))
    except ValueError as error:
        raise _bad("its table is not valid JSON") from error


def _table(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise _bad("its table lacks a part")
    return value


def _list(table: dict[str, Any], name: str) -> list[dict[str, Any]]:
    value = table.get(name, [])
    if type(value) is not list or not all(type(item) is dict for item in value):
        raise _bad(f"its table has {name!r} of another type than torch writes")
    return value


def _text(table: dict[str, Any], name: str) -> str:
    value = table.get(name)
    if type(value) is not str or not value:
        raise _bad(f"its table lacks {name!r} of something")
    return value


def _integer(value: Any) -> int:
    """Read a number, which protobuf spells as text where it may need 64 bits."""
    if type(value) is str and _INTEGER.fullmatch(value):
        return int(value)
    if type(value) is int:
        return value
    raise _bad("its table holds a number that is none")


def _integers(table: dict[str, Any], name: str) -> tuple[int, ...]:
    values = table.get(name, [])
    if type(values) is not list:
        raise _bad(f"its table has {name!r} of another type than torch writes")
    return tuple(_integer(value) for value in values)


def _read_tensor(program: _Program, number: int, entry: dict[str, Any]) -> TensorSpec:
    code = _text(entry, "dataType")
    if code not in _DTYPES or entry.get("isQuantized", False) is not False:
        raise _bad(f"tensor {number} is quantized or of the unknown type {code!r:.20}")
    dtype = BY_NAME[_DTYPES[code]]
    view = _open_storage(program, _text(_table(entry.get("data")), "key"), dtype)
    return view_tensor(
        view,
        _integer(entry.get("offset", 0)),
        _integers(entry, "dims"),
        _integers(entry, "strides"),
        requires_grad=entry.get("requiresGrad") is True,
        is_parameter=False,
        label=f"tensor {number}",
    )


def _open_storage(program: _Program, key: str, dtype: DType) -> PickledStorage:
    record = program.records.get(f"{program.root}/{key}")
    if record is None or record.nbytes % dtype.itemsize:
        raise _bad(f"the record {key!r:.80} is missing, or no whole number of elements")
    opened = Storage(key, record.open(program.file), record.nbytes)
    storage, known = program.storages.setdefault(key, (opened, dtype))
    if known is not dtype:
        raise _bad(f"the record {key!r:.80} holds {known.name} and {dtype.name}")
    return PickledStorage(storage, dtype, 0, record.nbytes // dtype.itemsize)


def _collect(program: _Program, main: dict[str, Any]) -> Weights:
    """Walk the modules as ``state_dict()`` does: parameters, buffers, then the modules below."""
    weights = Weights()
    stack = [("", 0, main)]
    visited = 0
    while stack:
        prefix, depth, module = stack.pop()
        visited += 1
        if visited > _MOST_MODULES or depth > _DEEPEST:
            raise _bad("its modules nest without end")
        _collect_one(program, weights, prefix, module)
        below = _list(module, "submodules")
        stack.extend((f"{prefix}{_text(child, 'name')}.", depth + 1, child) for child in reversed(below))
    return weights


def _collect_one(program: _Program, weights: Weights, prefix: str, module: dict[str, Any]) -> None:
    entries = _list(module, "parameters")
    for entry in sorted(entries, key=lambda entry: entry.get("isBuffer") is True):
        name, number = prefix + _text(entry, "name"), _integer(entry.get("tensorId", 0))
        if not 0 <= number < len(program.tensors) or name in weights.state_dict:
            raise _bad(f"the tensor {name!r:.80} is named twice, or is none")
        weights.state_dict[name] = program.tensors[number]
        program.unnamed.pop(number, None)


def _bad(what: str) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(f"this TorchScript archive of torch before 1.2 is damaged: {what}; {AGAIN}")
