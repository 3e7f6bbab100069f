"""A TorchScript archive: a program with its weights, of which only the weights are read.

Records, all under one folder: ``data.pkl`` (the modules, pickled) with ``data/KEY``, ``constants.pkl`` (a tuple) with
``constants/KEY``, ``code/.../*.py`` (the classes), and more that no tensor needs
(torch/csrc/jit/serialization/export_module.cpp, import.cpp). Which attributes are parameters and which are buffers
stands in the classes' source, in the first two lines of each; nothing else of it is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ckptool.errors import AGAIN, UnreadableCheckpoint
from ckptool.formats.file import InputFile
from ckptool.formats.pickle import GlobalLog
from ckptool.formats.sources import read_bytes
from ckptool.formats.torch_zip import (
    StorageTable,
    extra_findings,
    find_root,
    other_records,
    read_facts,
    read_pickle_record,
    storage_findings,
)
from ckptool.formats.zip import Archive, Record
from ckptool.model.checkpoint import Checkpoint, Finding
from ckptool.model.values import DictNode, GlobalRef, OpaqueTensor, Storage, Stub, TensorSpec, walk

_LARGEST_CODE = 64 << 20
_MOST_MODULES = 1_000_000
_DEEPEST = 256

_CLASS = re.compile(r"^class (\w+)(?:\((\w*)\))?:\n((?:  __(?:parameters|buffers)__ = .*\n)*)", re.MULTILINE)
_NAMES = re.compile(r"  __(parameters|buffers)__ = \[((?:\"[^\"\\]*\", ?)*)\]\n")
_OWN_RECORD = re.compile(
    r"data\.pkl|constants\.pkl|bytecode\.pkl|mobile_debug_handles\.pkl|traced_inputs\.pkl|model\.json|attributes\.pkl"
    r"|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"
    r"|(?:code|extra|data|constants|traced_inputs|tensors)/.*"
)

_EXPORT = "load it with torch.jit.load and save its state_dict() with torch.save"


@dataclass(frozen=True, slots=True)
class Names:
    """Hold which attributes of a class are parameters and which are buffers.

    ``buffers`` is None where the class does not say: before torch 1.5 all other tensors were.
    """

    is_module: bool
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] | None = None


@dataclass
class Weights:
    """Collect what ``state_dict()`` of the program would give, and the tensors that it would leave out."""

    state_dict: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)

    def as_root(self, constants: Any) -> DictNode:
        """Lay out the value tree: the state dict, then what there is beside it."""
        parts = {"program_attributes": DictNode(list(self.attributes.items())), "program_constants": constants}
        beside = [(name, part) for name, part in parts.items() if part is not None and len(part)]
        return DictNode([("state_dict", DictNode(list(self.state_dict.items()))), *beside])


def read_torchscript(file: InputFile, archive: Archive) -> Checkpoint:
    """Describe the tensors of a program; its code is not run, no storage is read.

    :raises UnreadableCheckpoint: it is damaged, contradicts itself, or lacks the classes of its modules.
    """
    records = {name: record for name, record in archive.records.items() if not name.endswith("/")}
    root = find_root(archive.records)
    facts = read_facts(file, records, root)
    if facts.get("byteorder") == "big":
        raise UnreadableCheckpoint(f"this TorchScript archive is of a big-endian machine; {_EXPORT} there")
    log = GlobalLog()
    module, modules_table = _read_part(file, records, root, "data", log)
    constants, constants_table = _read_part(file, records, root, "constants", log)
    weights = _collect_weights(module, _read_classes(file, records, root))
    tables = (modules_table, constants_table)
    used = [storage for table in tables for storage in table.used()]
    return Checkpoint(
        path=file.path,
        format="torchscript",
        file_bytes=file.size,
        root=weights.as_root(list(constants) if isinstance(constants, tuple) else constants),
        file=file,
        storages=tuple(used),
        globals=log.uses(),
        findings=(*archive.findings, *log.findings, *_findings(records, root), *storage_findings(used, [])),
        facts=facts,
        others=other_records(file, _unread(records, used)),
    )


def _unread(records: dict[str, Record], used: list[Storage]) -> list[Record]:
    """List what holds no tensor and no code, which have been read: above all where each line of the code comes from."""
    names = {storage.source.label for storage in used}
    return [record for name, record in records.items() if name not in names and not name.endswith(".py")]


def _read_part(
    file: InputFile, records: dict[str, Record], root: str, name: str, log: GlobalLog
) -> tuple[Any, StorageTable]:
    """Read one pickle of the archive with the storages beside it; None where there is none."""
    table = StorageTable(file, records, f"{root}/{name}/", big_endian=False)
    record = records.get(f"{root}/{name}.pkl")
    if record is None:
        return None, table
    return read_pickle_record(file, record, table, log, f"{name}.pkl"), table


def _findings(records: dict[str, Record], root: str) -> Iterator[Finding]:
    within = [name.removeprefix(f"{root}/") for name in records]
    programs = sum(name.startswith("code/") and name.endswith(".py") for name in within)
    yield Finding("program", f"this is a program of {programs} code files, which torch.jit.load would prepare to run")
    yield from extra_findings(sorted(name for name in within if not _OWN_RECORD.fullmatch(name)))


# --- classes ------------------------------------------------------------------------------------------------------


def _read_classes(file: InputFile, records: dict[str, Record], root: str) -> dict[tuple[str, str], Names]:
    """Read which attributes of each class are parameters and buffers, by module and name of the class.

    :raises UnreadableCheckpoint: a class is declared in a way that torch does not write.
    """
    prefix = f"{root}/code/"
    sources = [record for name, record in records.items() if name.startswith(prefix) and name.endswith(".py")]
    if sum(record.nbytes for record in sources) > _LARGEST_CODE:
        raise UnreadableCheckpoint(f"the code of this TorchScript archive is too long to look through; {_EXPORT}")
    classes: dict[tuple[str, str], Names] = {}
    for record in sources:
        module = record.name.removeprefix(prefix).removesuffix(".py").replace("/", ".")
        for name, names in _declared(file, record):
            if (module, name) in classes:
                raise _odd(record, f"declares the class {name!r:.60} twice")
            classes[module, name] = names
    return classes


def _declared(file: InputFile, record: Record) -> Iterator[tuple[str, Names]]:
    data = read_bytes(record.open(file))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise _odd(record, "is not UTF-8") from None
    if '"""' in text:  # inside a long text, what looks like a class would be none
        raise _odd(record, "holds a text of several lines")
    for found in _CLASS.finditer(text):
        yield found[1], _read_names(record, found)


def _read_names(record: Record, found: re.Match[str]) -> Names:
    lists = {line[1]: tuple(re.findall(r'"([^"]*)"', line[2])) for line in _NAMES.finditer(found[3])}
    if len(lists) != found[3].count("\n"):
        raise _odd(record, f"lists the parameters of {found[1]!r:.60} in another way than torch does")
    return Names(found[2] == "Module", lists.get("parameters", ()), lists.get("buffers"))


def _odd(record: Record, what: str) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(f"the code in {record.name!r:.100} {what}; {_EXPORT}")


# --- modules ------------------------------------------------------------------------------------------------------


def _collect_weights(module: Any, classes: dict[tuple[str, str], Names]) -> Weights:
    """Walk the modules as ``state_dict()`` does: parameters, buffers, then each module below, under every name.

    :raises UnreadableCheckpoint: a module has no class, or they nest without end.
    """
    weights = Weights()
    stack: list[tuple[str, int, Stub]] = [("", 0, _as_module(module, classes))]
    visited = 0
    while stack:
        prefix, depth, stub = stack.pop()
        visited += 1
        if visited > _MOST_MODULES or depth > _DEEPEST:
            raise UnreadableCheckpoint(f"the modules of this TorchScript archive nest without end; {_EXPORT}")
        fields = stub.fields or DictNode()
        below = _collect_one(weights, prefix, fields.text_items(), classes[_class_of(stub.ref)], classes)
        stack.extend((f"{prefix}{name}.", depth + 1, child) for name, child in reversed(below))
    return weights


def _class_of(ref: GlobalRef) -> tuple[str, str]:
    return ref.module, ref.name


def _as_module(value: Any, classes: dict[tuple[str, str], Names]) -> Stub:
    names = classes.get(_class_of(value.ref)) if isinstance(value, Stub) else None
    if not isinstance(value, Stub) or names is None or not names.is_module:
        what = value.ref.full_name if isinstance(value, Stub) else type(value).__name__
        raise UnreadableCheckpoint(f"the TorchScript archive lacks the class {what!r:.100} of its module; {AGAIN}")
    return value


def _collect_one(
    weights: Weights, prefix: str, fields: dict[str, Any], names: Names, classes: dict[tuple[str, str], Names]
) -> list[tuple[str, Stub]]:
    """Collect the tensors of one module; give the modules right below it."""
    tensors = [name for name, value in fields.items() if _is_tensor(value)]
    own = dict.fromkeys((*names.parameters, *(tensors if names.buffers is None else names.buffers)))
    weights.state_dict.update((prefix + name, fields[name]) for name in own if _is_tensor(fields.get(name)))
    below = []
    for name, value in fields.items():
        if isinstance(value, Stub) and _is_module(value, classes):
            below.append((name, value))
        elif name not in own:
            weights.attributes.update((prefix + name + path, tensor) for path, tensor in _tensors_in(value))
    return below


def _is_module(value: Stub, classes: dict[tuple[str, str], Names]) -> bool:
    return classes.get(_class_of(value.ref), Names(is_module=False)).is_module


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TensorSpec | OpaqueTensor)


def _tensors_in(value: Any) -> Iterator[tuple[str, Any]]:
    """Find the tensors in a list, a mapping or an object, each with the steps that lead there."""
    opaque: list[tuple[str, ...]] = []
    for path, node in walk(value):
        if _is_tensor(node) and not any(path[: len(above)] == above for above in opaque):
            yield "".join(path), node
        if isinstance(node, OpaqueTensor):
            opaque.append(path)
