"""Pickles read as data: protocols 0 to 5, nothing imported, nothing called, nothing looked up."""

from __future__ import annotations

import gc
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.pickle.engine import TruncatedPickle
from ckptool.formats.pickle.machine import Machine
from ckptool.formats.pickle.reading import (
    BareStorage,
    GlobalLog,
    LoadBytes,
    LoadNamed,
    LoadStorage,
    LoadStorages,
    Malformed,
    PickledStorage,
    Reading,
    StorageType,
)
from ckptool.formats.pickle.severity import normalise
from ckptool.formats.pickle.tensors import STORAGE_TYPES, as_parameter, rebuild_views
from ckptool.formats.pickle.tree import check_tree
from ckptool.formats.pickle.views import view_storage
from ckptool.model.values import GlobalRef, TensorSpec

__all__ = [
    "SCANNED_BYTES",
    "GlobalLog",
    "LoadStorage",
    "LoadStorages",
    "PickledStorage",
    "StorageType",
    "TruncatedPickle",
    "Unpickled",
    "read_pickle",
    "scan_foreign",
    "scan_rest",
    "storage_type",
    "view_tensor",
]

Loaded = TypeVar("Loaded")

SCANNED_BYTES = 16 << 20  # of what is no part of the checkpoint
_REST_ATTEMPTS = 256
_RETRIED_BYTES = 64 << 10  # are looked at from each further beginning: in all, everything once
_PROTOCOL = re.compile(rb"\x80[\x02-\x05]")  # how pickles of protocol 2 and later begin


@dataclass(frozen=True, slots=True)
class Unpickled:
    """Hold what one pickle says, as values of ``model/values.py``, and the byte offset behind its STOP."""

    value: Any
    end: int


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the cyclic garbage collector: a parse makes a million objects and no garbage, and it would scan them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_pickle(
    data: bytes | memoryview,
    *,
    label: str,
    load_storage: LoadStorage | None,
    log: GlobalLog,
    load_storages: LoadStorages | None = None,
    load_named: LoadNamed | None = None,
    load_bytes: LoadBytes | None = None,
    start: int = 0,
) -> Unpickled:
    """Read the pickle that begins at byte ``start``; ``label`` names it in messages and in the log.

    ``load_storage`` gets persistent ids as ``("storage", StorageType, key, location, numel[, view])``, only the
    second checked; ``load_storages`` the columns of many such, from the second to the fifth, and may give None: then
    they are loaded one by one. ``load_named`` gets those that are texts, as before torch 0.1.10, and ``load_bytes``
    the storages that ``pickle.dump`` writes as bytes. What the log holds stays when the rest turns out to be malformed.

    :raises UnreadableCheckpoint: the bytes are no pickle, or one that only running it could complete.
    """
    reading = Reading(label, log, len(data) - start)
    with _without_collector():
        try:
            return _run(Machine(bytes(data), start, reading, load_storage, load_storages, load_named, load_bytes))
        except BareStorage:
            # Rare, and a look at what every storage becomes would cost each of the others: read again with that look.
            reading = Reading(label, log, len(data) - start)
            views = _viewing(load_storage), None, _viewing(load_named), _viewing(load_bytes)
            return _run(Machine(bytes(data), start, reading, *views))


def _viewing(load: Callable[[Loaded], Any] | None) -> Callable[[Loaded], Any] | None:
    """Have storages come as the tensors of all their elements."""

    def load_view(identifier: Loaded) -> Any:
        found = load(identifier) if load is not None else None
        return view_storage(found) if isinstance(found, PickledStorage) else found

    return None if load is None else load_view


def scan_rest(data: bytes | memoryview, *, label: str, log: GlobalLog, start: int) -> None:
    """Note the bytes behind a pickle, which its loader never looks at, and log what any pickle among them names."""
    rest = bytes(data[start : start + SCANNED_BYTES])
    if rest:
        log.note("trailing-bytes", f"{label}: {len(data) - start} bytes follow the pickle, which torch ignores")
        scan_foreign(rest, label=f"{label} (rest)", log=log)


def scan_foreign(data: bytes, *, label: str, log: GlobalLog) -> None:
    """Log what any pickle names among bytes that are no part of the checkpoint: another program may load them.

    Of what breaks off only names count, and the harmless ones only if it began as a pickle: the rest is found in any
    tensor and any text.
    """
    position, within = len(data) - len(data.lstrip(b"\0")), data
    for _ in range(_REST_ATTEMPTS):
        if position >= len(data):
            return
        seen = GlobalLog()
        try:
            end = read_pickle(within, label=label, load_storage=None, log=seen, start=position).end
            uses = seen.uses()
        except UnreadableCheckpoint:
            begins = _PROTOCOL.match(data, position)
            uses = tuple([use for use in seen.uses() if _is_telling(use.ref, began=begins is not None)])
            found = _PROTOCOL.search(data, position + 1)
            end = found.start() if found else len(data)
        for use in uses:
            log.record(use.ref, use.where, use.called)
        position, within = end, data[: end + _RETRIED_BYTES]


def _is_telling(ref: GlobalRef, *, began: bool) -> bool:
    return not ref.name.startswith("<") and (began or ref.severity == "dangerous")


def storage_type(value: Any) -> StorageType | None:
    """Give the storage class that a pickle names, or None for any other value."""
    return STORAGE_TYPES.get(normalise(value.module, value.name)) if type(value) is GlobalRef else None


def view_tensor(
    storage: PickledStorage,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    *,
    requires_grad: bool,
    is_parameter: bool,
    label: str,
) -> TensorSpec:
    """Describe a view of a storage that a container declares outside a pickle; ``label`` names it in messages.

    :raises UnreadableCheckpoint: it reaches beyond the storage, or no tensor can be like it.
    """
    try:
        (view,) = rebuild_views((storage,), (offset,), (shape,), (stride,), (requires_grad,))
        if is_parameter:
            view = as_parameter(view, requires_grad)
    except Malformed as error:
        raise UnreadableCheckpoint(f"{label!r:.100} {error}; the file is damaged or crafted, get it again") from None
    return view


def _run(machine: Machine) -> Unpickled:
    try:
        stopped = machine.execute()
        check_tree(stopped.value, machine.reading)
        machine.judge_resolvers([stopped.value])
    except UnreadableCheckpoint as error:
        machine.judge_resolvers([])
        error.globals = machine.reading.log.uses()
        raise
    except (Malformed, IndexError, struct.error) as error:
        machine.judge_resolvers([])
        refusal = machine.explain(error)
        refusal.globals = machine.reading.log.uses()
        raise refusal from None
    return Unpickled(stopped.value, stopped.end)
