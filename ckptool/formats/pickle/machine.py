"""The pickle machine: every opcode of protocols 0 to 5, nothing imported, nothing called.

Opcodes as in CPython's Lib/pickle.py; where its readers or torch's disagree, the stream is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

from ckptool.formats.pickle import arrays, plain, severity, shortcut, tensors
from ckptool.formats.pickle.engine import UINT8, Stopped
from ckptool.formats.pickle.opcodes import VALUE_OPCODES, ValueMachine
from ckptool.formats.pickle.reading import (
    DYNAMIC,
    Draft,
    Handler,
    LoadBytes,
    LoadNamed,
    LoadStorage,
    LoadStorages,
    Malformed,
    Reading,
    StorageType,
    Truncated,
)
from ckptool.formats.pickle.tree import holds
from ckptool.model.values import DictNode, GlobalRef, Stub, TensorSpec

_HANDLERS: dict[tuple[str, str], Handler] = {**plain.HANDLERS, **tensors.HANDLERS, **arrays.HANDLERS}
_SAFE = frozenset().union(
    _HANDLERS, tensors.STORAGE_TYPES, tensors.CONSTANTS,
    plain.REFERENCES, tensors.REFERENCES, arrays.REFERENCES,
)  # fmt: skip
# NEWOBJ makes an object of a class; a function has none to make.
_CLASSES = frozenset({
    ("builtins", "set"), ("builtins", "frozenset"), ("collections", "Counter"), ("collections", "OrderedDict"),
    ("collections", "defaultdict"), ("torch", "Size"), ("torch.nn.parameter", "Parameter"),
})  # fmt: skip
# Their __new__ looks at no argument: what seems to be their content never gets there.
_BORN_EMPTY = _CLASSES & {
    ("builtins", "set"), ("collections", "Counter"), ("collections", "OrderedDict"), ("collections", "defaultdict"),
}  # fmt: skip
_GETATTR = ("builtins", "getattr")
_LOAD_BYTES = ("torch.storage", "_load_from_bytes")
_INVALID = GlobalRef("<invalid>", "<invalid>", "dangerous")
_NOTHING = GlobalRef("", "", "safe")
_EXTENSION = GlobalRef("copyreg", "<extension code>", "dangerous")


class Machine(ValueMachine):
    """Execute all opcodes; ``load_storage`` and ``load_storages`` answer persistent ids, where there are storages."""

    def __init__(
        self,
        data: bytes,
        start: int,
        reading: Reading,
        load_storage: LoadStorage | None,
        load_storages: LoadStorages | None = None,
        load_named: LoadNamed | None = None,
        load_bytes: LoadBytes | None = None,
    ) -> None:
        super().__init__(data, start, reading)
        self.load_storage = load_storage
        self.load_storages = load_storages
        self.load_named = load_named
        self.load_bytes = load_bytes
        self._names: dict[tuple[str, str], Any] = {}
        # By identity of the GlobalRef, which ``_names`` keeps alive: hashing its fields takes ten times as long.
        self._calls: dict[int, Callable[[tuple[Any, ...]], Any]] = {}
        self.storage_types: dict[int, StorageType] = {}
        # What the shortcut goes by: the two names that it knows, once they are called; where it shall not try again.
        self.tensor_call = self.hooks_call = _NOTHING
        self.loop_until = 0

    def execute(self) -> Stopped:
        """Run to STOP.

        :raises Malformed: the bytes are no pickle.
        """
        return self.run({code: method.__get__(self) for code, method in _OPCODES.items()})

    def judge_resolvers(self, values: list[Any]) -> None:
        """Rate what finds attributes by what became of it, which only the end shows.

        Called at once, for a member of a class, it is harmless. Given to something that calls it later, with names
        that nobody has seen, it finds everything; and what it found may be a part of the program, to be changed.
        """
        resolvers = {
            id(ref): ref for (module, name), ref in self._names.items() if severity.normalise(module, name) == _GETATTR
        }
        if not resolvers:
            return
        stubs = self.reading.stubs
        changed = any(_is_changed(stub) for stub in stubs if id(stub.ref) in resolvers)
        if changed or holds([*values, *stubs], resolvers):
            for ref in resolvers.values():
                self.reading.log.record(GlobalRef(ref.module, ref.name, "dangerous"), self.reading.label, called=True)

    # Control

    def _proto(self, position: int) -> int:
        version = self.data[position]
        if version > 5:
            raise Malformed(f"states protocol {version}, and 5 is the highest")
        if position - 1 != self.start:
            self.reading.note("misplaced-proto", "states its protocol in the middle")
        return position + 1

    def _frame(self, position: int) -> int:
        (nbytes,) = UINT8.unpack_from(self.data, position)
        if self.is_framed:
            raise Malformed("begins a frame inside a frame")
        if nbytes > self.end - position - 8:
            raise Truncated
        self.limit, self.is_framed = position + 8 + nbytes, True
        return position + 8

    def _stop(self, position: int) -> int:
        if position > self.limit:
            raise Malformed("has an instruction that crosses the end of its frame")
        value = self.stack.pop()
        if self.stack or self.marked:
            self.reading.note("leftover-stack", "leaves values behind that nobody gets")
        raise Stopped(value, position)

    def _mark(self, position: int) -> int:
        if self.stack and self.stack[-1] is self.tensor_call:
            end = shortcut.read_tensors(self, position - 1)
            if end is not None:
                return end
        self.marked.append(self.stack)
        self.stack = []
        return position

    def _pop(self, position: int) -> int:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()
        return position

    def _pop_marked(self, position: int) -> int:
        self.pop_mark()
        return position

    def _duplicate(self, position: int) -> int:
        self.stack.append(self.stack[-1])
        return position

    # Names

    def _global(self, position: int) -> int:
        start = position
        module, position = self.read_line(position)
        name, position = self.read_line(position)
        self.stack.append(self._refer(_decode_name(module), _decode_name(name), start - 1))
        return position

    def _stack_global(self, position: int) -> int:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is str and type(module) is str:
            self.stack.append(self._refer(module, name, position - 1))
        else:
            self.reading.note("computed-name", "computes the name of what it asks for")
            self.stack.append(self._introduce(DYNAMIC, position - 1))
        return position

    def _refer(self, module: str, name: str, position: int) -> Any:
        """Give what stands for a name: a plain value where it has one, else a reference that leads nowhere."""
        key = (module, name)
        if key not in self._names:
            self._names[key] = self._look_up(module, name, position)
        return self._names[key]

    def _look_up(self, module: str, name: str, position: int) -> Any:
        if not severity.is_name(module) or not severity.is_name(name):
            self.reading.note("invalid-name", "asks for something whose name is none")
            return self._introduce(_INVALID, position)
        spelled = severity.normalise(module, name)
        rating = "safe" if spelled in _SAFE else severity.rate(module, name)
        ref = self._introduce(GlobalRef(module, name, rating), position)
        if spelled in tensors.STORAGE_TYPES:
            self.storage_types[id(ref)] = tensors.STORAGE_TYPES[spelled]
        return tensors.CONSTANTS.get(spelled, ref)

    def _introduce(self, ref: GlobalRef, position: int) -> GlobalRef:
        self.reading.log.record(ref, self.where(position), called=False)
        return ref

    def _refuse_extension(self, position: int) -> int:
        self.reading.log.record(_EXTENSION, self.where(position - 1), called=True)
        raise Malformed("uses extension codes, which only the program that wrote it can resolve")

    def _refuse_buffer(self, position: int) -> int:
        raise Malformed("refers to buffers that are not in the file")

    # Calls

    def _reduce(self, position: int) -> int:
        args = self.stack.pop()
        function = self.stack[-1]
        if type(args) is not tuple:
            raise Malformed("calls something without a tuple of arguments")
        call = self._calls.get(id(function)) or self._first_call(function, position - 1)
        self.stack[-1] = call(args)
        return position

    def _first_call(self, function: Any, position: int) -> Callable[[tuple[Any, ...]], Any]:
        """Decide what a call of this name means, and record that it is called."""
        if type(function) is GlobalRef:
            self.reading.log.record(function, self.where(position), called=True)
            spelled = severity.normalise(function.module, function.name)
            handler = _HANDLERS.get(spelled, _get_nested if spelled == _GETATTR else _keep_call)
            if self.load_bytes is not None and spelled == _LOAD_BYTES:
                handler = self._load_bytes
            if handler is _keep_call and spelled in _SAFE:
                handler = Reading.misfit
            if handler is tensors.rebuild_tensor_v2:
                self.tensor_call = function
            elif handler is plain.make_mapping:
                self.hooks_call = function
            call = self._calls[id(function)] = partial(handler, self.reading, function)
            return call
        if type(function) is not Stub:
            raise Malformed("calls something that is no function")
        self.reading.note_computed_call(self.where(position))
        return lambda args: self.reading.stub(DYNAMIC, (function, *args))

    def _inst(self, position: int) -> int:
        start = position
        module, position = self.read_line(position)
        name, position = self.read_line(position)
        args = tuple(self.pop_mark())
        kind = self._refer(_decode_name(module), _decode_name(name), start - 1)
        self.stack.append((self._calls.get(id(kind)) or self._first_call(kind, start - 1))(args))
        return position

    def _obj(self, position: int) -> int:
        items = self.pop_mark()
        kind = items.pop(0)
        self.stack.append((self._calls.get(id(kind)) or self._first_call(kind, position - 1))(tuple(items)))
        return position

    def _newobj(self, position: int) -> int:
        args, kind = self.stack.pop(), self.stack.pop()
        self.stack.append(self._make(kind, args, None, position - 1))
        return position

    def _newobj_ex(self, position: int) -> int:
        kwargs, args, kind = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if type(kwargs) is not DictNode:
            raise Malformed("makes an object without a dictionary of arguments")
        self.stack.append(self._make(kind, args, kwargs if kwargs.pairs else None, position - 1))
        return position

    def _make(self, kind: Any, args: Any, kwargs: Any, position: int) -> Any:
        """Make an object of a class: what a handler knows, else a stub."""
        if type(args) is not tuple:
            raise Malformed("makes an object without a tuple of arguments")
        if type(kind) is Stub:
            return self._first_call(kind, position)(args)
        if type(kind) is not GlobalRef:
            raise Malformed("makes an object of something that is no class")
        self.reading.log.record(kind, self.where(position), called=True)
        spelled = severity.normalise(kind.module, kind.name)
        if spelled in _CLASSES and kwargs is None and not (args and spelled in _BORN_EMPTY):
            return _HANDLERS[spelled](self.reading, kind, args)
        if spelled in _SAFE:
            return self.reading.misfit(kind, args)
        return self.reading.stub(kind, args, kwargs)

    def _build(self, position: int) -> int:
        state = self.stack.pop()
        self.stack[-1] = self._set_state(self.stack[-1], state, position - 1)
        return position

    def _set_state(self, target: Any, state: Any, position: int) -> Any:
        """Keep a state as data beside its object; nothing is ever set on anything."""
        kind = type(target)
        if kind is Stub:
            return self._set_stub_state(target, state)
        if kind is Draft:
            value = target.finish(state)
            self._replace(target, value)
            return value
        if kind is DictNode:
            return _set_attributes(target, state)
        if kind is GlobalRef:
            self.reading.note("build-on-global", f"sets attributes of {target.full_name} itself")
            doubted = GlobalRef(target.module, target.name, "dangerous")
            self.reading.log.record(doubted, self.where(position), called=True)
            return target
        if kind is TensorSpec:
            return tensors.build_parameter(target, state)
        raise Malformed("sets attributes of something that has none")

    def _replace(self, draft: Draft, value: Any) -> None:
        """Put a finished value where its draft was remembered: lately, if at all."""
        looked_at = 0
        for index, remembered in reversed(self.memo.items()):
            looked_at += 1
            if remembered is draft:
                self.memo[index] = value
                break
        self.reading.charge(looked_at)

    def _set_stub_state(self, target: Stub, state: Any) -> Stub:
        if target.state is not None:
            raise Malformed("sets the state of one object twice")
        if target.fields is None:
            parts = state if type(state) is tuple else (state,)
            self.reading.charge(sum(len(part.pairs) for part in parts if type(part) is DictNode))
        target.state = state
        return target

    # Persistent ids

    def _binpersid(self, position: int) -> int:
        pid = self.stack.pop()
        self.stack.append(self._load(pid))
        return position

    def _load(self, pid: Any) -> Any:
        """Answer what torch writes: ``("storage", class, key, location, numel[, view])`` or a module's class."""
        if self.load_named is not None:
            return self._load_named(self.load_named, pid)
        if self.load_storage is None:
            raise Malformed("refers to storages, which only a torch container has")
        if type(pid) is not tuple or not 4 <= len(pid) <= 6 or type(pid[0]) is not str:
            raise Malformed("refers to something that is no storage")
        kind = pid[1]
        if pid[0] == "module" and len(pid) == 4 and type(kind) is GlobalRef:
            return kind  # the class itself; the source text beside it is never looked at
        storage_type = self.storage_types.get(id(kind))
        if storage_type is None or pid[0] != "storage" or len(pid) == 4:
            raise Malformed("refers to something that is no storage")
        return self.load_storage(("storage", storage_type, *pid[2:]))

    def _load_bytes(self, reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
        """Read a storage that lies in the pickle as a file of its own."""
        if len(args) != 1 or type(args[0]) is not bytes or self.load_bytes is None:
            return reading.misfit(ref, args)
        reading.charge(len(args[0]))  # the same bytes may be loaded any number of times
        return self.load_bytes(args[0])

    def _load_named(self, load: LoadNamed, pid: Any) -> Any:
        """Answer what torch wrote before 0.1.10: the key of a tensor or storage, or a module's class and source."""
        if type(pid) is tuple and len(pid) == 3 and type(pid[0]) is GlobalRef:
            return pid[0]
        found = load(pid) if type(pid) is str else None
        if found is None:
            raise Malformed("refers to something that is no tensor and no storage")
        return found

    def _persid(self, position: int) -> int:
        raise Malformed("refers to storages as text, which torch never does")


def _decode_name(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return ""  # no name: reported as an invalid one


def _keep_call(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Stub:
    return reading.stub(ref, args)


def _is_class(value: Any) -> TypeGuard[GlobalRef]:
    return type(value) is GlobalRef and severity.is_class_name(value.name) and value.severity != "dangerous"


def _is_changed(stub: Stub) -> bool:
    return stub.state is not None or bool(stub.items or stub.pairs)


def _get_nested(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Read how protocols 0 to 3 spell a class inside a class, and Python 3.11.0 to 3.11.3 a member of an enumeration;
    any other attribute is what attacks are made of.
    """
    owner, name = args if len(args) == 2 else (None, None)
    if not _is_class(owner) or type(name) is not str or not name.isidentifier() or name.startswith("_"):
        reading.log.record(GlobalRef(ref.module, ref.name, "dangerous"), reading.label, called=True)
        return reading.stub(ref, args)
    nested = f"{owner.name}.{name}"
    found = GlobalRef(owner.module, nested, severity.rate(owner.module, nested))
    reading.log.record(found, reading.label, called=False)
    # In small letters it may be a method: kept as what a call gave, which nobody calls without being noticed.
    return found if severity.is_class_name(name) else reading.stub(ref, args)


def _set_attributes(target: DictNode, state: Any) -> DictNode:
    """Keep what is set on a mapping itself, such as a state dict's ``_metadata``; a plain dict has no attributes."""
    if target.type_name in ("dict", "defaultdict") or type(state) is not DictNode or target.attributes is not None:
        raise Malformed("sets attributes of a dictionary that has none")
    target.attributes = state
    return target


_OPCODES: dict[int, Callable[[Machine, int], int]] = {
    **VALUE_OPCODES,
    ord("("): Machine._mark, ord("."): Machine._stop, ord("0"): Machine._pop, ord("1"): Machine._pop_marked,
    ord("2"): Machine._duplicate, 0x80: Machine._proto, 0x95: Machine._frame, ord("c"): Machine._global,
    0x93: Machine._stack_global, ord("R"): Machine._reduce, ord("i"): Machine._inst, ord("o"): Machine._obj,
    0x81: Machine._newobj, 0x92: Machine._newobj_ex, ord("b"): Machine._build, ord("Q"): Machine._binpersid,
    ord("P"): Machine._persid, 0x82: Machine._refuse_extension, 0x83: Machine._refuse_extension,
    0x84: Machine._refuse_extension, 0x97: Machine._refuse_buffer, 0x98: Machine._refuse_buffer,
}  # fmt: skip
