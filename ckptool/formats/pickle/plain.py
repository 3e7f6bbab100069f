"""What Python's own types become, for exactly the arguments that picklers write (an int never sizes anything)."""

from __future__ import annotations

from typing import Any

from ckptool.formats.pickle.reading import Handler, Reading
from ckptool.model.values import DictNode, GlobalRef, SetNode, Stub

_LATIN1 = ("latin1", "latin-1")


def _make_set(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    kind = "frozenset" if ref.name == "frozenset" else "set"
    if args == ():
        return SetNode([], kind)
    if len(args) != 1 or type(args[0]) not in (list, tuple):
        return reading.misfit(ref, args)
    reading.charge(len(args[0]))
    return SetNode(list(args[0]), kind)


def _make_bytes(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Read what protocols 0 to 2 write for bytes and bytearray."""
    if args == ():
        return b""
    if len(args) == 1 and type(args[0]) is bytes:
        return args[0]
    return _encode(reading, ref, args)


def _encode(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Read bytes that protocols 0 to 2 write as text; no other codec is ever looked up."""
    if len(args) != 2 or type(args[0]) is not str or type(args[1]) is not str or args[1] not in _LATIN1:
        return reading.misfit(ref, args)
    reading.charge(len(args[0]))
    try:
        return args[0].encode("latin-1")
    except UnicodeEncodeError:
        return reading.misfit(ref, args)


def _make_complex(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    if len(args) == 2 and type(args[0]) is type(args[1]) is float:
        return complex(args[0], args[1])
    return reading.misfit(ref, args)


def _make_interval(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Keep a slice or range as its three numbers; a range is never expanded."""
    if 1 <= len(args) <= 3 and all(type(arg) in (int, type(None)) for arg in args):
        return Stub(ref, args)
    return reading.misfit(ref, args)


def make_mapping(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Read an OrderedDict: empty, or a list of pairs as Python 2 wrote it."""
    if args == ():
        return DictNode(type_name=ref.name)
    if len(args) != 1 or type(args[0]) is not list:
        return reading.misfit(ref, args)
    reading.charge(len(args[0]))
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in args[0]):
        return reading.misfit(ref, args)
    return DictNode([(pair[0], pair[1]) for pair in args[0]], ref.name)


def _make_counter(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    if args == ():
        return DictNode(type_name="Counter")
    if len(args) != 1 or type(args[0]) is not DictNode:
        return reading.misfit(ref, args)
    reading.charge(len(args[0].pairs))
    return DictNode(list(args[0].pairs), "Counter")


def _make_defaultdict(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Read an empty defaultdict; its factory, a class or None, has no say in the data."""
    if len(args) <= 1 and all(type(arg) in (GlobalRef, type(None)) for arg in args):
        return DictNode(type_name="defaultdict")
    return reading.misfit(ref, args)


def _reconstruct(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Read what protocols 0 and 1 write for an object: its class, the built-in type below it, that one's value."""
    if len(args) != 3 or type(args[0]) is not GlobalRef or type(args[1]) is not GlobalRef:
        return reading.misfit(ref, args)
    kind, _, base = args
    if type(base) is DictNode:
        reading.charge(len(base.pairs))
        return reading.keep(Stub(kind, pairs=list(base.pairs)))
    if type(base) is list:
        reading.charge(len(base))
        return reading.keep(Stub(kind, items=list(base)))
    return reading.stub(kind, () if base is None else (base,))


def _make_object(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Read ``copyreg.__newobj__``, the NEWOBJ of protocols 0 and 1."""
    if not args or type(args[0]) is not GlobalRef:
        return reading.misfit(ref, args)
    return reading.stub(args[0], args[1:])


def _make_size(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    if len(args) != 1 or type(args[0]) not in (list, tuple) or not all(type(size) is int for size in args[0]):
        return reading.misfit(ref, args)
    reading.charge(len(args[0]))
    return tuple(args[0])


def _make_device(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Give a device as torch prints it: a fact to show, never obeyed."""
    if len(args) == 1 and type(args[0]) is str:
        return args[0]
    if len(args) == 2 and type(args[0]) is str and type(args[1]) is int:
        return f"{args[0]}:{args[1]}"
    return reading.misfit(ref, args)


def _get_layout(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    if len(args) == 1 and type(args[0]) is str:
        return args[0]
    return reading.misfit(ref, args)


def _make_list(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Read a list of one element type, as TorchScript writes it."""
    if len(args) != 1 or type(args[0]) not in (list, tuple):
        return reading.misfit(ref, args)
    reading.charge(len(args[0]))
    return list(args[0])


def _restore_type(reading: Reading, ref: GlobalRef, args: tuple[Any, ...]) -> Any:
    """Read a container that TorchScript wrote beside the name of its type."""
    if len(args) != 2 or type(args[1]) is not str:
        return reading.misfit(ref, args)
    return args[0]


# Source: torch/csrc/jit/serialization/pickler.cpp (pushSpecializedList, startTypeTag).
_TYPED_LISTS = ("build_boollist", "build_doublelist", "build_intlist", "build_tensorlist")

HANDLERS: dict[tuple[str, str], Handler] = {
    ("builtins", "set"): _make_set,
    ("builtins", "frozenset"): _make_set,
    ("builtins", "bytearray"): _make_bytes,
    ("builtins", "bytes"): _make_bytes,
    ("builtins", "complex"): _make_complex,
    ("builtins", "slice"): _make_interval,
    ("builtins", "range"): _make_interval,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): make_mapping,
    ("collections", "Counter"): _make_counter,
    ("collections", "defaultdict"): _make_defaultdict,
    ("copyreg", "_reconstructor"): _reconstruct,
    ("copyreg", "__newobj__"): _make_object,
    ("torch", "Size"): _make_size,
    ("torch", "device"): _make_device,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("torch.jit._pickle", "restore_type_tag"): _restore_type,
    **{("torch.jit._pickle", name): _make_list for name in _TYPED_LISTS},
}

# Types that are named, as a default factory or an annotation, and not called.
REFERENCES = frozenset(
    ("builtins", name) for name in ("bool", "dict", "float", "int", "list", "object", "str", "tuple")
)
