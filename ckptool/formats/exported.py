"""A program of ``torch.export`` (``.pt2``), of which only the tensors are read.

Records, all under one folder: ``models/NAME.json`` (the graph), and for weights and constants a table in JSON that
names for each tensor a record with the bytes of its storage, or one that ``torch.save`` wrote
(torch/export/pt2_archive/_package.py; torch/_export/serde/schema.py, PayloadMeta, TensorMeta, ScalarType, Layout).
Before torch 2.8 there was no folder, and one file of ``torch.save`` for all weights (torch/export/__init__.py, load).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ckptool.errors import AGAIN, UnreadableCheckpoint
from ckptool.formats.file import InnerFile, InputFile
from ckptool.formats.json_tables import read_json
from ckptool.formats.pickle import GlobalLog, PickledStorage, read_pickle, view_tensor
from ckptool.formats.sniff import HEAD_BYTES, archive_kind, recognise
from ckptool.formats.sources import read_bytes
from ckptool.formats.torch_zip import (
    LARGEST_PICKLE,
    find_root,
    other_records,
    read_facts,
    read_torch_zip,
    storage_findings,
)
from ckptool.formats.zip import STORED, Archive, Record, read_archive
from ckptool.model.checkpoint import Checkpoint, Finding
from ckptool.model.dtypes import BY_NAME, DType
from ckptool.model.values import DictNode, GlobalUse, OpaqueTensor, Storage, TensorSpec

_LARGEST_TABLE = 256 << 20
_LARGEST_GRAPH = 16 << 20

_SCALARS = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64",
    9: "complex32", 10: "complex64", 11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16",
    29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu",
    34: "uint32", 35: "uint64",
}  # fmt: skip
_STRIDED = 7
_PARTS = {
    "state_dict": ("data/weights/", "_weights_config.json"),
    "program_constants": ("data/constants/", "_constants_config.json"),
}
_OLD_PARTS = {"state_dict": "serialized_state_dict", "program_constants": "serialized_constants"}
_PAYLOAD = re.compile(r"[0-9A-Za-z_.-]{1,128}")
_MODEL = re.compile(r"models/([^/]+)\.json")
_VERSION = re.compile(rb'"torch_version": ?"([0-9A-Za-z.+]{1,40})"')

_RESAVE = "load it with torch.export.load and save its state_dict with torch.save"


@dataclass
class _Package:
    """Collect what the parts of one archive hold; ``root`` is the folder of its records, with its slash."""

    file: InputFile
    records: dict[str, Record]
    root: str
    storages: dict[str, tuple[Storage, DType]] = field(default_factory=dict)
    nested: list[Storage] = field(default_factory=list)
    saved: list[str] = field(default_factory=list)  # archives in the archive, with checksums of their own
    globals: list[GlobalUse] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def record(self, name: str) -> Record:
        """Give a record.

        :raises UnreadableCheckpoint: there is none of this name.
        """
        found = self.records.get(self.root + name)
        if found is None:
            raise UnreadableCheckpoint(f"the archive has no record {name!r:.100}; {AGAIN}")
        return found


def read_exported(file: InputFile, archive: Archive) -> Checkpoint:
    """Describe the weights and constants of exported programs; no storage is read.

    :raises UnreadableCheckpoint: the archive is damaged, contradicts itself, or holds compiled programs alone.
    """
    folder = find_root(archive.records)
    package = _Package(file, archive.records, f"{folder}/")
    facts = read_facts(file, archive.records, folder)
    if facts.get("byteorder") == "big":
        raise UnreadableCheckpoint(f"this torch.export archive is of a big-endian machine; {_RESAVE} there")
    within = [name.removeprefix(package.root) for name in archive.records]
    models = [found[1] for name in within if (found := _MODEL.fullmatch(name))]
    if not models:
        raise UnreadableCheckpoint(f"this torch.export archive holds compiled programs, and no weights; {_RESAVE}")
    roots = [(model, _read_model(package, model)) for model in models]
    version = _torch_version(package, models[0])
    facts |= {"torch_version": version} if version else {}
    root = roots[0][1] if len(roots) == 1 else DictNode(list(roots))
    return _checkpoint(package, root, archive, facts, len(models))


def read_old_exported(file: InputFile, archive: Archive) -> Checkpoint:
    """Describe the weights and constants of a program exported by torch 2.1 to 2.7; no storage is read.

    :raises UnreadableCheckpoint: the archive is damaged or contradicts itself.
    """
    package = _Package(file, archive.records, "")
    pairs = [(part, _read_saved(package, _old_record(package, name))) for part, name in _OLD_PARTS.items()]
    return _checkpoint(package, DictNode([pair for pair in pairs if pair[1] is not None]), archive, {}, 1)


def _old_record(package: _Package, name: str) -> Record:
    return package.records.get(f"{name}.json") or package.record(f"{name}.pt")


def _checkpoint(package: _Package, root: Any, archive: Archive, facts: dict[str, str], models: int) -> Checkpoint:
    raw = [storage for storage, _ in package.storages.values()]
    read = {*(storage.source.label for storage in raw), *package.saved}
    others = [record for name, record in package.records.items() if name not in read]
    what = "a program" if models == 1 else f"{models} programs"
    program = Finding("program", f"this is {what} of torch.export, which torch.export.load would prepare to run")
    return Checkpoint(
        path=package.file.path,
        format="torch-export",
        file_bytes=package.file.size,
        root=root,
        file=package.file,
        storages=(*raw, *package.nested),
        globals=tuple(package.globals),
        findings=(*archive.findings, *package.findings, program, *storage_findings(raw, [])),
        facts=facts,
        others=other_records(package.file, others),
    )


def _torch_version(package: _Package, model: str) -> str | None:
    record = package.record(f"models/{model}.json")
    if record.nbytes > _LARGEST_GRAPH:
        return None
    found = _VERSION.findall(_read_record(package, record))
    return found[-1].decode("ascii") if found else None


def _read_record(package: _Package, record: Record) -> bytes:
    return read_bytes(record.open(package.file))


def _read_model(package: _Package, model: str) -> DictNode:
    pairs = [(part, _read_part(package, model, *names)) for part, names in _PARTS.items()]
    return DictNode([pair for pair in pairs if pair[0] == "state_dict" or len(pair[1])])


def _read_part(package: _Package, model: str, folder: str, ending: str) -> Any:
    """Read the weights or constants of one program: all in one file of torch.save, or by their table."""
    saved = package.records.get(f"{package.root}{folder}{model}.pt")
    if saved is not None:
        value = _read_saved(package, saved)
        return DictNode() if value is None else value
    table = _read_table(package, package.record(f"{folder}{model}{ending}"))
    return DictNode([(name, _read_entry(package, folder, name, entry)) for name, entry in table.items()])


def _read_table(package: _Package, record: Record) -> dict[str, Any]:
    if record.nbytes > _LARGEST_TABLE:
        raise UnreadableCheckpoint(f"the table {record.name!r:.100} declares {record.nbytes:,} bytes; {_RESAVE}")
    try:
        table = read_json(_read_record(package, record))
    except ValueError as error:
        raise UnreadableCheckpoint(f"the table {record.name!r:.100} is not valid JSON; {AGAIN}") from error
    entries = table.get("config") if type(table) is dict else None
    if type(entries) is not dict:
        raise UnreadableCheckpoint(f"the table {record.name!r:.100} is none of tensors; {AGAIN}")
    return entries


def _read_entry(package: _Package, folder: str, name: str, entry: Any) -> Any:
    payload = entry.get("path_name") if type(entry) is dict else None
    if type(payload) is not str or not _PAYLOAD.fullmatch(payload) or type(entry.get("use_pickle")) is not bool:
        raise _bad(name, "is described in a way that torch does not write")
    record = package.record(folder + payload)
    if entry["use_pickle"]:
        return _read_saved(package, record)
    return _read_raw(package, record, name, entry)


# --- tensors as their bytes ---------------------------------------------------------------------------------------


def _read_raw(package: _Package, record: Record, name: str, entry: dict[str, Any]) -> TensorSpec | OpaqueTensor:
    meta = entry.get("tensor_meta")
    if type(meta) is not dict or type(entry.get("is_param")) is not bool or type(meta.get("requires_grad")) is not bool:
        raise _bad(name, "is described in a way that torch does not write")
    dtype, layout = _read_dtype(name, meta.get("dtype")), meta.get("layout")
    if layout != _STRIDED:
        raise _bad(name, f"has the layout {layout!r:.20}, which is not dense")
    shape, stride = _read_sizes(name, meta.get("sizes")), _read_sizes(name, meta.get("strides"))
    (offset,) = _read_sizes(name, [meta.get("storage_offset")])
    if record.nbytes == 0 and 0 not in shape:
        return OpaqueTensor("meta", "no data", dtype, shape)
    storage = _open_storage(package, record, name, dtype)
    view = PickledStorage(storage, dtype, 0, record.nbytes // dtype.itemsize)
    return view_tensor(
        view, offset, shape, stride, requires_grad=meta["requires_grad"], is_parameter=entry["is_param"], label=name
    )


def _read_dtype(name: str, code: Any) -> DType:
    found = _SCALARS.get(code) if type(code) is int else None
    if found is None:
        raise _bad(name, f"has the unknown element type {code!r:.20}")
    return BY_NAME[found]


def _read_sizes(name: str, sizes: Any) -> tuple[int, ...]:
    """Read numbers that each stand in an object of their own; a symbolic one has no value."""
    if type(sizes) is not list:
        raise _bad(name, "has sizes of another type than torch writes")
    numbers = tuple(size.get("as_int") if type(size) is dict and len(size) == 1 else None for size in sizes)
    if any(type(number) is not int for number in numbers):
        raise _bad(name, "has sizes that are no numbers")
    return numbers  # type: ignore[return-value]


def _open_storage(package: _Package, record: Record, name: str, dtype: DType) -> Storage:
    """Describe the storage in a record; all tensors that share it have its element type."""
    if record.nbytes % dtype.itemsize:
        raise _bad(name, f"has {record.nbytes:,} bytes, which are no whole number of elements")
    key = record.name.removeprefix(package.root)
    storage, known = package.storages.setdefault(key, (Storage(key, record.open(package.file), record.nbytes), dtype))
    if known is not dtype:
        raise _bad(name, f"shares its bytes with a tensor of {known.name}")
    return storage


def _bad(name: str, what: str) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(f"the tensor {name!r:.100} {what}; {_RESAVE}")


# --- what torch.save or pickle wrote ------------------------------------------------------------------------------


def _read_saved(package: _Package, record: Record) -> Any:
    """Read a record that is a file of torch.save or a pickle; None where it is empty."""
    if record.nbytes == 0:
        return None
    if record.method != STORED:
        raise UnreadableCheckpoint(f"the record {record.name!r:.100} is compressed, as torch never does; {_RESAVE}")
    inner = InnerFile(package.file, record.offset, record.nbytes)
    kind = recognise(inner.read(0, min(inner.size, HEAD_BYTES)))
    if kind == ["pickle"]:
        return _read_object(package, record)
    archive = read_archive(inner) if kind == ["zip"] else None
    if archive is None or archive_kind(archive.records) != "torch-zip":
        raise UnreadableCheckpoint(f"the record {record.name!r:.100} is no file of torch.save; {AGAIN}")
    saved = read_torch_zip(inner, archive)
    package.saved.append(record.name)
    package.nested += saved.storages
    package.globals += saved.globals
    package.findings += [finding for finding in saved.findings if finding.code != "no-checksums"]
    return saved.root


def _read_object(package: _Package, record: Record) -> Any:
    """Read an object that the program keeps as a constant, as data."""
    if record.nbytes > LARGEST_PICKLE:
        raise UnreadableCheckpoint(f"the record {record.name!r:.100} is a pickle of {record.nbytes:,} bytes; {_RESAVE}")
    log = GlobalLog()
    value = read_pickle(_read_record(package, record), label=record.name, load_storage=None, log=log).value
    package.globals += log.uses()
    package.findings += log.findings
    return value
