"""The pickle machine against CPython's own pickler and tables, and against every stream that no pickler writes."""

from __future__ import annotations

import ast
import base64
import builtins
import contextlib
import io
import math
import pickle
import random
import resource
import struct
import sys
import time
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.opcodes import Pickle

import ckptool
from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.pickle import (
    GlobalLog,
    PickledStorage,
    StorageType,
    TruncatedPickle,
    Unpickled,
    read_pickle,
    scan_rest,
)
from ckptool.formats.pickle.machine import _OPCODES
from ckptool.formats.sources import MemorySource
from ckptool.model.dtypes import BY_NAME, DType
from ckptool.model.values import DictNode, GlobalRef, OpaqueTensor, SetNode, Storage, Stub, TensorSpec

try:
    from test import pickletester
except ImportError:  # Debian ships Python without Python's own tests
    pickletester = None

INLINED = b"rq\x94K"  # the loop itself executes these


def load_storage(pid: tuple[Any, ...]) -> PickledStorage:
    """Answer a persistent id with as many zero bytes as it asks for, up to a thousand elements."""
    _, kind, key, location, numel, *view = pid
    assert type(kind) is StorageType
    if type(numel) is not int or not 0 <= numel <= 1000 or type(key) is not str or type(location) is not str:
        raise UnreadableCheckpoint("the storage is none")
    nbytes = numel * (kind.dtype.itemsize if kind.dtype else 1)
    storage = Storage(key, MemorySource("memory", bytes(nbytes)), nbytes, location)
    if view and view[0] is not None:
        return PickledStorage(storage, kind.dtype, view[0][1], view[0][2])
    return PickledStorage(storage, kind.dtype, 0, numel)


def read(data: bytes, log: GlobalLog | None = None) -> Unpickled:
    """Read a pickle of a container that has every storage."""
    return read_pickle(data, label="data.pkl", load_storage=load_storage, log=log or GlobalLog())


def refused(data: bytes) -> UnreadableCheckpoint:
    """Give the refusal of a pickle, which is one short sentence."""
    with pytest.raises(UnreadableCheckpoint) as caught:
        read(data)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return caught.value


def severities(data: bytes) -> dict[str, str]:
    """Give the severity of every name, from the log or from the refusal."""
    log = GlobalLog()
    try:
        read(data, log)
    except UnreadableCheckpoint as error:
        return {use.ref.full_name: use.ref.severity for use in error.globals}
    return {use.ref.full_name: use.ref.severity for use in log.uses()}


def codes(data: bytes) -> list[str]:
    """Give the codes of all findings."""
    log = GlobalLog()
    read(data, log)
    return [finding.code for finding in log.findings]


def plain(value: Any) -> Any:
    """Turn the machine's values back into Python's, to compare them with what CPython loads."""
    if type(value) is DictNode:
        return {plain(key): plain(item) for key, item in value.pairs}
    if type(value) is SetNode:
        return {"set": set, "frozenset": frozenset}[value.type_name](map(plain, value.items))
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


# Agreement with CPython

scalars = (
    st.none() | st.booleans() | st.integers(-(2**500), 2**500) | st.floats(allow_nan=False) | st.text(max_size=20)
    | st.binary(max_size=20) | st.complex_numbers(allow_nan=False)
)  # fmt: skip
keys = st.text(max_size=8) | st.integers() | st.tuples(st.integers(), st.text(max_size=3))
values = st.recursive(
    scalars | st.sets(st.integers(), max_size=5) | st.frozensets(st.text(max_size=3), max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=30,
)


@settings(max_examples=150, deadline=None)
@given(value=values, protocol=st.integers(0, 5))
def test_plain_data_reads_as_cpython_reads_it(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    assert repr(plain(read(data).value)) == repr(pickle.loads(data))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("value", "expected", "type_name"),
    [
        (OrderedDict(b=1, a=2), [("b", 1), ("a", 2)], "OrderedDict"),
        (Counter("aab"), [("a", 2), ("b", 1)], "Counter"),
        (defaultdict(list, x=[1]), [("x", [1])], "defaultdict"),
    ],
)
def test_mappings_keep_their_order_and_their_kind(
    value: Any, expected: list[tuple[Any, Any]], type_name: str, protocol: int
) -> None:
    node = read(pickle.dumps(value, protocol)).value
    assert (node.pairs, node.type_name) == (expected, type_name)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [slice(1, None, 2), range(0, 10**15, 3), bytearray(b"\x00\xff"), float("inf"), -0.0])
def test_builtin_values(value: Any, protocol: int) -> None:
    got = read(pickle.dumps(value, protocol)).value
    if type(value) in (slice, range):
        assert got.args == (value.start, value.stop, value.step)
        assert got.ref.severity == "safe"
    else:
        assert repr(got) == repr(bytes(value) if type(value) is bytearray else value)


def test_nan_survives_every_protocol() -> None:
    assert all(math.isnan(read(pickle.dumps(float("nan"), protocol)).value) for protocol in range(6))


@pytest.mark.parametrize("protocol", range(6))
def test_cycles_are_kept_and_noted(protocol: int) -> None:
    value: list[Any] = [{}]
    value[0]["self"] = value
    data = pickle.dumps(value, protocol)
    got = read(data).value
    assert got[0].get("self") is got
    assert codes(data) == ["cycle"]


def test_every_opcode_is_known() -> None:
    named = {
        getattr(pickle, name)[0]
        for name in pickle.__all__
        if name.isupper() and type(getattr(pickle, name)) is bytes and len(getattr(pickle, name)) == 1
    }
    assert len(named) == 68
    assert named == {*_OPCODES, *INLINED}


def table_of(test: str) -> list[bytes]:
    """Take the streams that one of CPython's own tests is made of: none where this Python came without its tests."""
    if pickletester is None:
        return []
    tree = ast.parse(Path(pickletester.__file__).read_text())
    function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == test)
    lists = [node for node in ast.walk(function) if isinstance(node, ast.List)]
    found = [element.value for element in lists[0].elts if isinstance(element, ast.Constant)]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("data", table_of("test_bad_stack") + table_of("test_bad_mark"))
def test_bad_stacks_of_cpython_are_refused(data: bytes) -> None:
    assert not isinstance(refused(data), TruncatedPickle) or data[:1] in b"cV"


@pytest.mark.parametrize("data", [b"", b"N", *table_of("test_truncated_data")])
def test_truncated_streams_of_cpython_are_refused(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize("data", table_of("test_badly_quoted_string"))
def test_badly_quoted_strings_of_cpython_are_refused(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"S''\n.", ""),
        (b'S""\n.', ""),
        (b"S'a'\n.", "a"),
        (rb"S'\x41\n\\\'\101'" + b"\n.", "A\n\\'A"),
        (rb"S'\xff'" + b"\n.", b"\xff"),
        (b"U\x02\xc3\xa9.", "é"),
        (b"U\x01\xe9.", b"\xe9"),
        (b"T\x01\x00\x00\x00a.", "a"),
        (rb"V\u20ac" + b"\n.", "€"),
        (b"I00\n.", False),
        (b"I01\n.", True),
        (b"I-5\n.", -5),
        (b"L5L\n.", 5),
        (b"L5\n.", 5),
        (b"F1e-3\n.", 0.001),
        (b"\x8a\x00.", 0),
        (b"\x8b\x02\x00\x00\x00\xff\xff.", -1),
        (b"\x8d\x01\x00\x00\x00\x00\x00\x00\x00a.", "a"),
        (b"\x8e\x01\x00\x00\x00\x00\x00\x00\x00a.", b"a"),
        (b"((lNt.", ([], None)),
    ],
)
def test_literals(data: bytes, expected: Any) -> None:
    got = read(data).value
    assert (got, type(got)) == (expected, type(expected))


# A: code and evasion

DANGEROUS = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("subprocess", "Popen"), ("builtins", "eval"),
    ("__builtin__", "eval"), ("__builtin__", "execfile"), ("pip", "main"),
    ("asyncio.unix_events", "_UnixSubprocessTransport._start"), ("pkgutil", "resolve_name"),
    ("importlib", "import_module"), ("operator", "attrgetter"), ("operator", "methodcaller"),
    ("functools", "reduce"), ("pickle", "loads"), ("_pickle", "loads"), ("cPickle", "loads"), ("torch", "load"),
    ("torch.storage", "_load_from_bytes"), ("joblib", "load"), ("numpy", "load"), ("commands", "getoutput"),
    ("httplib", "HTTPSConnection"), ("types", "CodeType"), ("runpy", "_run_code"), ("bdb", "Bdb.run"),
    ("pathlib", "os.system"), ("torch", "hub.load"), ("torch", "serialization.load"),
    ("torch.serialization", "io.open"),
    ("numpy", "testing._private.utils.runstring"), ("_operator", "attrgetter"), ("_functools", "reduce"),
    ("_imp", "create_dynamic"), ("_socket", "socket"), ("_io", "open"), ("pathlib", "Path.write_text"),
    ("uuid", "_get_command_stdout"), ("logging", "FileHandler"), ("torch._dynamo.guards", "GuardBuilder.get"),
    ("torch._inductor.codecache", "compile_file"), ("unittest.mock", "_importer"), ("itertools", "starmap"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name"), DANGEROUS)
@pytest.mark.parametrize("spelling", ["reduce", "stack", "inst", "obj", "newobj", "popped", "built"])
def test_dangerous_calls_stay_data_and_are_named(module: str, name: str, spelling: str) -> None:
    argument = Pickle().value(("x",)).data[2:]
    stream = {
        "reduce": Pickle().name(module, name).raw(argument).reduce(),
        "stack": Pickle(4).stack_name(module, name).raw(argument).reduce(),
        "inst": Pickle().mark().text("x").raw(f"i{module}\n{name}\n".encode()),
        "obj": Pickle().mark().name(module, name).text("x").raw(b"o"),
        "newobj": Pickle().name(module, name).raw(argument).newobj(),
        "popped": Pickle().mark().name(module, name).text("x").raw(b"o").pop().none(),
        "built": Pickle().call(module, name, "x").raw(b"}").build().pop().none(),
    }[spelling]
    log = GlobalLog()
    value = read(stream.stop(), log).value
    (use,) = log.uses()
    assert use.ref == GlobalRef(module, name, "dangerous")
    assert use.called
    assert use.where.startswith("data.pkl@")
    if spelling not in ("popped", "built"):
        assert type(value) is Stub
        assert value.args == ("x",)


def test_no_name_of_the_standard_library_is_clean_when_called() -> None:
    for module in sorted(sys.stdlib_module_names):
        (severity,) = severities(Pickle().call(module, "anything").stop()).values()
        assert severity in ("unknown", "dangerous"), module


def test_what_a_call_gives_is_never_called() -> None:
    stream = Pickle().call("some.where", "make").value(("x",)).reduce().stop()
    assert severities(stream) == {"some.where.make": "unknown", "<computed>.<computed>": "dangerous"}
    assert codes(stream) == ["computed-call"]


@pytest.mark.parametrize(("module", "name"), [("torch", "_utils._rebuild_tensor_v2"), ("torch._utils._rebuild", "")])
def test_dotted_names_never_reach_a_handler(module: str, name: str) -> None:
    stream = Pickle(4).stack_name(module, name).mark().storage().value(0).value((4,)).value((1,)).raw(b"\x89NtR").stop()
    assert type(read(stream).value) is Stub
    assert "safe" not in [severity for key, severity in severities(stream).items() if "_utils" in key]


def test_a_class_inside_a_class_is_a_name() -> None:
    def nested(owner: tuple[str, str], name: str) -> Pickle:
        return Pickle().name("__builtin__", "getattr").mark().name(*owner).text(name).raw(b"tR")

    stream = nested(("cfg", "Config"), "Mode").value((1,)).reduce().stop()
    assert (read(stream).value.ref.full_name, read(stream).value.args) == ("cfg.Config.Mode", (1,))
    assert severities(stream) == {
        "__builtin__.getattr": "info", "cfg.Config": "unknown", "cfg.Config.Mode": "unknown",
    }  # fmt: skip
    bad = [(("os", "X"), "Y"), (("cfg", "Config"), "__init__"), (("cfg", "Config"), "mode"), (("a", "b"), "C")]
    for owner, name in bad:
        assert "dangerous" in severities(nested(owner, name).value((1,)).reduce().stop()).values()


@pytest.mark.parametrize(
    ("owner", "member", "worst"),
    [
        (("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"), "TORCH_PRESERVE_FORMAT", "info"),
        (("cfg", "Mode"), "fast", "unknown"),
        (("cfg", "Mode"), "_fast", "dangerous"),
        (("cfg", "mode"), "fast", "dangerous"),
        (("cfg", "Mode.__init__"), "fast", "dangerous"),
        (("ctypes", "CDLL"), "LIBC", "dangerous"),
    ],
)
def test_a_member_of_an_enumeration_is_no_danger(owner: tuple[str, str], member: str, worst: str) -> None:
    """What Python 3.11.0 to 3.11.3 write of one: ``getattr(Mode, "fast")``."""
    stream = Pickle(4).stack_name("builtins", "getattr").stack_name(*owner).text(member).raw(b"\x86R").stop()
    found = severities(stream)
    assert max(found.values(), key=("safe", "info", "unknown", "dangerous").index) == worst
    assert f"{'.'.join(owner)}.{member}" in found or worst == "dangerous"


@pytest.mark.parametrize("name", ["Split.test", "Lang.code"])
def test_what_is_only_called_like_a_module_is_no_danger(name: str) -> None:
    assert severities(Pickle(4).stack_name("cfg", name).stop()) == {f"cfg.{name}": "unknown"}


GETATTR = Pickle(None).text("builtins").text("getattr").raw(b"\x93").data
MODE = Pickle(None).text("cfg").text("Mode").raw(b"\x93").data
MEMBER = Pickle(None).raw(GETATTR + MODE).text("fast").raw(b"\x86R").data
HIDING = {
    "given to a call": Pickle(4).stack_name("lib", "starmap").raw(GETATTR + b"](" + MODE).text("x").raw(b"\x86e\x86R"),
    "given to it later": Pickle(4).stack_name("lib", "starmap").raw(b"]q\x07\x85R0h\x07" + GETATTR + b"a"),
    "given to it and thrown away": Pickle(4).stack_name("lib", "partial").raw(GETATTR + b"\x85R0N"),
    "a state": Pickle(4).stack_name("lib", "Thing").raw(b")\x81" + GETATTR + b"b0N"),
    "an item": Pickle(4).stack_name("copyreg", "_reconstructor").raw(MODE + MODE + b"](" + GETATTR + b"e\x87R0N"),
    "a value": Pickle(4).raw(b"}").text("x").raw(GETATTR + b"s"),
    "the root": Pickle(4).raw(GETATTR),
    "what it found has its attributes set": Pickle(4).raw(MEMBER).value({"x": 1}).build(),
    "what it found is a mapping to be changed": Pickle(4).raw(MEMBER).text("x").text("y").raw(b"s"),
    "what it found is a list to be changed": Pickle(4).raw(MEMBER).text("x").raw(b"a"),
}


@pytest.mark.parametrize("stream", HIDING.values(), ids=HIDING)
def test_what_finds_attributes_is_no_data(stream: Pickle) -> None:
    """Whoever calls it calls it with names that the pickle may have computed."""
    assert severities(Pickle(4).raw(MEMBER).stop())["builtins.getattr"] == "info"
    assert severities(stream.stop())["builtins.getattr"] == "dangerous"
    with pytest.raises(UnreadableCheckpoint) as refused:
        read(stream.raw(b"0\xff").stop())
    is_called = stream is not HIDING["a value"] and stream is not HIDING["the root"]
    found = {use.ref.full_name: use.ref.severity for use in refused.value.globals}
    assert found["builtins.getattr"] == ("dangerous" if is_called else "info")


def test_what_a_call_gave_is_not_called_by_what_rebuilds_tensors() -> None:
    stream = Pickle(4).stack_name("torch._tensor", "_rebuild_from_type_v2").mark().raw(MEMBER)
    stream.stack_name("torch", "Tensor").value(("x",)).none().raw(b"tR")
    assert severities(stream.stop())["<computed>.<computed>"] == "dangerous"
    assert "computed-call" in codes(stream.stop())


def test_computed_names() -> None:
    stream = Pickle(4).text("os").call("operator", "itemgetter", 0).raw(b"\x93").stop()
    assert severities(stream)["<computed>.<computed>"] == "dangerous"
    assert "computed-name" in codes(stream)


@pytest.mark.parametrize("name", ["", "a b", "a" * 300, "a\x1b[31m", "\u202eab"])
def test_names_that_are_none(name: str) -> None:
    assert severities(Pickle(4).stack_name("module", name).stop()) == {"<invalid>.<invalid>": "dangerous"}


def test_memo_is_simulated_and_not_guessed() -> None:
    stream = Pickle(4).text("os").put(7).pop().text("system").put(8).pop().text("decoy").pop()
    assert severities(stream.get(7).get(8).raw(b"\x93").stop()) == {"os.system": "dangerous"}


def test_build_never_changes_what_an_object_is() -> None:
    state = {"__class__": "x", "module": "os", "kind": "y", "ref": "z"}
    value = read(Pickle().call("some.where", "Thing").value(state).build().stop()).value
    assert value.ref == GlobalRef("some.where", "Thing", "unknown")
    assert value.fields.text_items() == state


def test_build_on_a_name_is_dangerous() -> None:
    stream = Pickle().name("torch._utils", "_rebuild_tensor_v2").value({"x": 1}).build().stop()
    assert severities(stream) == {"torch._utils._rebuild_tensor_v2": "dangerous"}
    assert codes(stream) == ["build-on-global"]
    assert type(read(stream).value) is GlobalRef


@pytest.mark.parametrize("rest", [b"", b"\xff", b"R", b"h\x05.", b"X\xff\xff\xff\x7f", b"}(Nu."])
def test_what_was_found_survives_a_broken_rest(rest: bytes) -> None:
    error = refused(Pickle().call("os", "system", "x").pop().data + rest)
    assert [use.ref.severity for use in error.globals] == ["dangerous"]


def test_what_was_found_survives_a_cut_at_any_byte() -> None:
    begin = Pickle().call("os", "system", "x").data
    whole = begin + Pickle(None).value({"a": [1, "b", (2.5, None)]}).stop()
    for end in range(len(begin), len(whole)):
        assert [use.called for use in refused(whole[:end]).globals] == [True]


def test_frames_hold_exactly() -> None:
    lying = [
        Pickle(4).frame(2).raw(b"B\x05\x00\x00\x00NNNNN").stop(),
        Pickle(4).frame(1).raw(b"K\x01").stop(),
        Pickle(4).frame(3).raw(b"X\x01\x00\x00\x00a").stop(),
        Pickle(4).frame(11).frame(1).raw(b"N").stop(),
        Pickle(4).frame(100).raw(b"N").stop(),
        Pickle(4).frame(2**63).raw(b"N").stop(),
        Pickle(4).frame(2).raw(b"cos\nsystem\n").stop(),
        Pickle(4).frame(16).raw(b"N" * 14 + b"\x8c\x05abcde").stop(),
    ]
    for data in lying:
        refused(data)
    for value in (b"x" * 200_000, list(range(100_000)), {str(i): "v" * 50 for i in range(5000)}):
        for protocol in (4, 5):
            assert plain(read(pickle.dumps(value, protocol)).value) == value


def test_leftovers_on_the_stack_are_noted() -> None:
    assert (read(b"(K\x01.").value, codes(b"(K\x01."), codes(b"NN.")) == (1, ["leftover-stack"], ["leftover-stack"])


@pytest.mark.parametrize("encode", [bytes, bytes.hex, lambda data: base64.b64encode(data).decode()])
def test_pickles_inside_are_noted(encode: Any) -> None:
    inner = pickle.dumps({"a": 1}, 2)
    assert codes(Pickle().value({"blob": encode(inner)}).stop()) == ["nested-pickle"]
    assert codes(Pickle().value({"blob": "800 words", "b": b"\x80\x02 not one"}).stop()) == []


@pytest.mark.parametrize("opcode", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"])
def test_extension_codes_are_refused_and_named(opcode: bytes) -> None:
    error = refused(Pickle().raw(opcode).raw(b")R").stop())
    assert [use.ref.severity for use in error.globals] == ["dangerous"]


@pytest.mark.parametrize("data", [b"\x80\x05\x97.", b"\x80\x05N\x98.", b"Pevil\n."])
def test_buffers_and_textual_ids_are_refused(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize(
    "pid",
    [
        "x", 5, ("storage",), ("x", "y", "z", "w", 5), ("storage", "FloatStorage", "0", "cpu", 4), {"a": 1}, None,
        ("storage", 1, "0", "cpu", 4), (1, 2, 3, 4, 5), ("module", "x", "y", "z"),
    ],
)  # fmt: skip
def test_ids_that_name_no_storage_are_refused(pid: Any) -> None:
    refused(Pickle().value(pid).raw(b"Q").stop())


@pytest.mark.parametrize("kind", ["QInt4Storage", "TypedStorage", "Tensor", "float32", "Float8Storage"])
def test_storage_classes_are_a_table(kind: str) -> None:
    refused(Pickle().storage(kind).stop())


def test_storages_need_a_container() -> None:
    with pytest.raises(UnreadableCheckpoint, match="only a torch container has"):
        read_pickle(Pickle().storage().stop(), label="x", load_storage=None, log=GlobalLog())


def test_a_legacy_module_id_is_its_class_and_the_source_is_never_used() -> None:
    stream = Pickle().mark().text("module").name("my.models", "Net").text("net.py").text("import os").raw(b"tQ)\x81")
    value = read(stream.value({"a": 1}).build().stop()).value
    assert (value.ref.full_name, value.args, value.fields.get("a")) == ("my.models.Net", (), 1)


@pytest.mark.parametrize(
    ("module", "name", "args"),
    [
        ("_codecs", "encode", ("aa", "rot13")),
        ("_codecs", "encode", ("aa", "zip_codec")),
        ("_codecs", "encode", ("é€", "latin1")),
        ("_codecs", "encode", ("aa",)),
        ("builtins", "bytearray", (50 * 2**30,)),
        ("builtins", "set", ("abc",)),
        ("builtins", "frozenset", (1, 2)),
        ("builtins", "complex", ("1j",)),
        ("builtins", "range", (1.5,)),
        ("collections", "Counter", ("aaa",)),
        ("collections", "OrderedDict", ([1, 2],)),
        ("collections", "OrderedDict", ({},)),
        ("collections", "defaultdict", (5,)),
        ("torch", "Size", (5,)),
        ("torch", "Size", ((1, "a"),)),
        ("torch", "device", (5,)),
        ("torch", "FloatTensor", (10**12,)),
        ("torch.storage", "UntypedStorage", (10**12,)),
        ("torch", "FloatStorage", (10**12,)),
        ("builtins", "list", ((1, 2),)),
        ("copyreg", "_reconstructor", (1, 2, 3)),
        ("numpy", "dtype", (5,)),
        ("numpy.core.multiarray", "_reconstruct", (1, (0,), b"b")),
    ],
)
def test_known_names_with_other_arguments_are_data_and_doubted(module: str, name: str, args: tuple[Any, ...]) -> None:
    stream = Pickle().call(module, name, *args).stop()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value = read(stream).value
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
    assert type(value) is Stub
    assert severities(stream) == {f"{module}.{name}": "unknown"}
    assert codes(stream) == ["unexpected-arguments"]


@pytest.mark.parametrize("name", ["set", "frozenset"])
def test_what_new_does_not_look_at_is_no_content(name: str) -> None:
    log = GlobalLog()
    value = read(Pickle().name("builtins", name).value(((1, 2),)).newobj().stop(), log).value
    made = getattr(builtins, name).__new__(getattr(builtins, name), (1, 2))
    assert (type(value) is SetNode) == bool(made)
    assert [use.ref.severity for use in log.uses()] == ["safe" if made else "unknown"]
    assert type(read(Pickle().name("collections", "OrderedDict").value(([(1, 2)],)).newobj().stop()).value) is Stub


@pytest.mark.parametrize("name", ["FloatStorage", "Size", "Tensor", "FloatTensor", "device"])
def test_an_object_of_a_known_name_that_is_no_class_of_data_is_doubted(name: str) -> None:
    stream = Pickle().name("torch", name).value((10**12, "x")).newobj().stop()
    assert type(read(stream).value) is Stub
    assert severities(stream) == {f"torch.{name}": "unknown"}


@pytest.mark.parametrize(
    ("module", "name", "args", "expected"),
    [
        ("__builtin__", "set", ([1, 2],), [1, 2]),
        ("copy_reg", "_reconstructor", None, None),
        ("__builtin__", "xrange", (0, 3, 1), (0, 3, 1)),
        ("_codecs", "encode", ("\x00ÿ", "latin1"), b"\x00\xff"),
        ("torch", "Size", ((1, 2),), (1, 2)),
        ("torch", "device", ("cuda", 3), "cuda:3"),
        ("torch.serialization", "_get_layout", ("torch.strided",), "torch.strided"),
    ],
)
def test_known_names_in_every_spelling(module: str, name: str, args: Any, expected: Any) -> None:
    if args is None:
        stream = Pickle().name(module, name).mark().name("m", "C").name("__builtin__", "object").none().raw(b"tR")
        assert read(stream.stop()).value.ref.full_name == "m.C"
        assert severities(stream.stop())["copy_reg._reconstructor"] == "safe"
        return
    stream = Pickle().call(module, name, *args).stop()
    value = read(stream).value
    assert getattr(value, "items", None) or getattr(value, "args", None) or value == expected
    assert set(severities(stream).values()) == {"safe"}


@pytest.mark.parametrize(
    ("module", "name", "severity"),
    [
        ("argparse", "Namespace", "info"),
        ("pathlib", "PosixPath", "info"),
        ("omegaconf.dictconfig", "DictConfig", "info"),
        ("torch.nn.modules.linear", "Linear", "info"),
        ("torch.nn.modules.linear", "exec", "unknown"),
        ("torch.optim.adamw", "AdamW", "info"),
        ("lightning.fabric.utilities.data", "AttributeDict", "info"),
        ("torch.nnx.modules", "Linear", "unknown"),
        ("omegaconfx", "DictConfig", "unknown"),
        ("__main__", "TrainingConfig", "unknown"),
        ("torch_utils.persistence", "_reconstruct_persistent_obj", "dangerous"),
        ("numpy.dtype", "dtype", "unknown"),
        ("torch", "float8_e4m3fn", "safe"),
        ("torch", "Tensor", "safe"),
    ],
)
def test_severities(module: str, name: str, severity: str) -> None:
    assert severities(Pickle().name(module, name).stop()) == {f"{module}.{name}": severity}


def test_objects_keep_what_their_class_carried() -> None:
    stream = Pickle().name("cfg", "Config").value((1,)).value({"lr": 0.1}).raw(b"\x92")
    value = read(stream.value({"depth": 18}).build().stop()).value
    assert (value.args, value.kwargs.text_items(), value.fields.text_items()) == ((1,), {"lr": 0.1}, {"depth": 18})
    listed = read(Pickle().call("cfg", "List").raw(b"(K\x01K\x02e").mark().text("k").none().raw(b"u").stop()).value
    assert (listed.items, listed.pairs) == ([1, 2], [("k", None)])


@pytest.mark.parametrize("target", ["tensor", "tuple", "text", "dict", "name"])
@pytest.mark.parametrize("change", [b"Na", b"(Ne", b"NNs", b"(NNu", b"(N\x90"])
def test_items_go_into_containers_only(target: str, change: bytes) -> None:
    begin = {
        "tensor": Pickle(4).tensor(),
        "tuple": Pickle(4).value(()),
        "text": Pickle(4).text("x"),
        "dict": Pickle(4).raw(b"}"),
        "name": Pickle(4).name("a", "B"),
    }[target]
    if target == "dict" and change[-1:] in b"su":
        assert read(begin.raw(change).stop()).value.pairs == [(None, None)]
    else:
        refused(begin.raw(change).stop())


@pytest.mark.parametrize("target", [{}, [], "x", 1, None, (1,)])
def test_attributes_are_set_on_objects_only(target: Any) -> None:
    refused(Pickle().value(target).value({"a": 1}).build().stop())


def test_a_state_is_set_once_and_metadata_stays_beside_the_dictionary() -> None:
    refused(Pickle().call("m", "C").value({"a": 1}).build().value({"a": 2}).build().stop())
    node = read(Pickle().call("collections", "OrderedDict").value({"_metadata": 5}).build().stop()).value
    assert (node.attributes.get("_metadata"), len(node)) == (5, 0)


def test_only_rebuild_functions_stand_inside_a_rebuild() -> None:
    def inside(module: str, name: str) -> bytes:
        stream = Pickle().name("torch._tensor", "_rebuild_from_type_v2").mark().name(module, name)
        return stream.name("torch", "Tensor").value(("x",)).none().raw(b"tR").stop()

    assert severities(inside("os", "system"))["os.system"] == "dangerous"
    assert (
        severities(inside("torch._tensor", "_rebuild_from_type_v2"))["torch._tensor._rebuild_from_type_v2"] == "unknown"
    )
    assert type(read(inside("os", "system")).value) is Stub


def test_the_package_never_loads_a_pickle() -> None:
    for path in Path(ckptool.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "pickle.load", "pickle.loads", "torch.load", "__import__"), path
                assert not called.endswith("Unpickler"), path


# B: bombs and malformed streams

LAUGHS = {
    "memo": b"(lq\x00" + b"".join(b"0(" + b"h%c" % i * 10 + b"lq%c" % (i + 1) for i in range(60)),
    "tuple": b"(tq\x00" + b"".join(b"0(" + b"h%c" % i * 10 + b"tq%c" % (i + 1) for i in range(60)),
    "duplicated": b"]" + b"22\x87" * 60,
    "values": b"}" + b"q\x00" + b"".join(b"}(K\x01h%cK\x02h%cuq%c" % (i, i, i + 1) for i in range(60)),
}


@pytest.mark.parametrize("name", LAUGHS)
def test_shared_values_cost_nothing(name: str) -> None:
    started = time.process_time()
    read(LAUGHS[name] + b".")
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "data",
    [
        b")" + b"\x85" * 1_000_000 + b".",
        b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",
        b"]" * 100_000 + b"a" * 99_999 + b".",
        b"(" * 1_000_000 + b".",
        b")" + b"2\x86" * 60 + b"\x94}h\x00Ns.",  # a key that takes Python years to hash
        b")" + b"2\x86" * 9 + b"\x94}(" + b"h\x00N" * 100_000 + b"u.",
        b"cm\nC\n" + b")R" + b"\x85cm\nC\n\x90" * 3,
        b"cm\nC\nq\x00)" + b"R\x85h\x00\x8e" * 1 + b".",
        b"}" + b"}" * 300 + b"Ns" * 300 + b".",
    ],
)
def test_deep_nesting_is_refused(data: bytes) -> None:
    started = time.process_time()
    refused(data)
    assert time.process_time() - started < 5


def test_depth_counts_the_longest_way() -> None:
    def nested(depth: int) -> bytes:
        return b")" + b"\x85" * depth + b"."

    assert read(nested(250)).value
    refused(nested(300))
    # First seen from the top, then again at the bottom of another branch: short on one way, deep on the other.
    chain = b")" + b"\x85" * 150 + b"q\x00"
    refused(b"](" + chain + b"h\x00" + b"\x85" * 150 + b"e.")


@pytest.mark.parametrize(
    "data",
    [
        b"\x8f\x94(h\x00\x90.",
        b"}\x94(h\x00Nu.",
        b"}]Ns.",
        b"}}Ns.",
        b"(]\x91.",
        b"]q\x00}h\x00h\x00s.",
    ],
)
def test_what_python_cannot_hash_is_no_key(data: bytes) -> None:
    refused(data)


def test_colliding_integer_keys_cost_nothing() -> None:
    stream = Pickle().raw(b"}(")
    for i in range(20_000):
        stream.data += b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N"
    started = time.process_time()
    assert len(read(stream.raw(b"u").stop()).value) == 20_000
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "data",
    [
        b"\x8b" + struct.pack("<i", 4000) + b"\x01" * 4000 + b".",
        b"\x8a\xff" + b"\x01" * 255 + b".",
        b"L" + b"9" * 5000 + b"L\n.",
        b"I" + b"9" * 5000 + b"\n.",
    ],
)
def test_huge_integers_are_described(data: bytes) -> None:
    value = read(data).value
    assert type(value) is Stub
    assert "bytes>" in value.args[0]


@pytest.mark.parametrize(
    "data",
    [
        b"I1_0\n.", b"I 7 \n.", b"I0x10\n.", b"I007\n.", b"I+5\n.", b"I\n.", b"I--5\n.", b"L1_0L\n.", b"LL\n.",
        b"F1_0\n.", b"F 1\n.", b"F\n.", b"F0x1p3\n.", b"Fnan(1)\n.", "I\u0665\n.".encode(), b"F" + b"1" * 9999 + b"\n.",
        b"p-1\n.", b"Np9999999999999999999\n.", b"Np1_0\n.", b"Npx\n.", b"Np 1\n.", b"Np4294967296\n.",
        b"h\x05.", b"g5\n.", b"j\x05\x00\x00\x00.", b"N\x94h\x01.", b"T\xff\xff\xff\xff.", b"\x8b\xff\xff\xff\xff.",
        b"X\xff\xff\xff\x7f.", b"\x8d" + struct.pack("<Q", 2**63) + b".", b"\x8e" + b"\xff" * 8 + b".",
        b"\x96" + b"\xff" * 8 + b".", b"B\xff\xff\xff\xff.", b"X\x01\x00\x00\x00\xff.", b"V\\u12\n.", b"S'\\xg'\n.",
        b"\x80\xc8N.", b"\x80\x06N.", b"\xff.", b"\x00" * 1000, b"", b".", b"}(Nu.", b"(NNNd.", b"NR.", b"N)R.",
        b"K\x01)R.", b"}NR.", b"cm\nC\n]R.", b"cm\nC\n)}}\x92.", b"cm\nC\n))\x92.", b"K\x01)\x81.",
    ],
)  # fmt: skip
def test_malformed_streams_are_refused(data: bytes) -> None:
    refused(data)


def test_memo_indices_are_no_sizes() -> None:
    assert read(b"\x80\x02}r\xff\xff\xff\x7f.").value.pairs == []
    stream = b"".join(b"Nr" + struct.pack("<I", i * 4000) + b"0" for i in range(50_000))
    assert read(stream + b"N.").value is None


def test_misplaced_protocols_are_noted() -> None:
    assert codes(b"\x80\x02\x80\x02N.") == codes(b"N0\x80\x02N.") == ["misplaced-proto"]


def test_odd_texts_and_numbers_are_kept() -> None:
    assert read(Pickle().text("\udc80bad").stop()).value == "\udc80bad"
    assert codes(Pickle().text("\udc80bad").stop()) == ["surrogate-text"]
    assert read(b"F1e999\n.").value == math.inf
    assert codes(b"}Fnan\nNs.") == ["nan-key"]


@pytest.mark.parametrize("data", [b"N0" * 2_000_000 + b"N.", b"](" + b"}" * 200_000 + b"e."])
def test_many_small_opcodes_take_linear_time(data: bytes) -> None:
    started = time.process_time()
    read(data)
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    "begin",
    [
        Pickle().name("collections", "OrderedDict").put(0).raw(b"(](").raw(b"NN\x86" * 20_000 + b"et"),
        Pickle().name("builtins", "set").put(0).raw(b"(](").raw(b"N" * 20_000 + b"et"),
        Pickle().name("m", "C").put(0).mark().raw(b"N" * 20_000 + b"t"),
        Pickle().name("_codecs", "encode").put(0).value(("x" * 20_000, "latin1")),
    ],
)
def test_a_shared_argument_is_not_copied_without_end(begin: Pickle) -> None:
    refused(begin.put(1).raw(b"0](" + b"h\x00j\x01\x00\x00\x00R" * 100_000 + b"e").stop())


def test_equal_keys_are_refused_and_named() -> None:
    for data in (b"}(X\x01\x00\x00\x00aNX\x01\x00\x00\x00aNu.", b"}X\x01\x00\x00\x00aNsX\x01\x00\x00\x00aNs."):
        assert "'a'" in str(refused(data))
    assert read(b"}(K\x01NK\x01Nu.").value.pairs == [(1, None), (1, None)]


def test_the_end_and_the_start_are_offsets() -> None:
    first, second = pickle.dumps([1], 2), pickle.dumps("x", 4)
    log = GlobalLog()
    data = memoryview(first + second + b"rest")
    one = read_pickle(data, label="x", load_storage=None, log=log)
    two = read_pickle(data, label="x", load_storage=None, log=log, start=one.end)
    assert (one.value, one.end, two.value, two.end) == ([1], len(first), "x", len(first + second))
    assert log.findings == []


@pytest.mark.parametrize("gap", [b"", b"\x00" * 300, b"junk", b"\x80\x02broken"])
def test_pickles_behind_a_pickle_are_found(gap: bytes) -> None:
    first = pickle.dumps([1], 2)
    log = GlobalLog()
    data = first + gap + Pickle().call("os", "system", "x").stop() + pickle.dumps("harmless", 2)
    end = read(data, log).end
    assert (end, log.uses()) == (len(first), ())
    scan_rest(data, label="data.pkl", log=log, start=end)
    assert [use.ref.full_name for use in log.uses()] == ["os.system"]
    assert [finding.code for finding in log.findings] == ["trailing-bytes"]


def test_nothing_behind_a_pickle_is_nothing() -> None:
    log = GlobalLog()
    scan_rest(b"N.", label="data.pkl", log=log, start=2)
    assert log.findings == []


SAMPLE = (
    Pickle(4).mark().text("w").tensor().text("n").value([1, 2.5, None, "é", b"\x00", (True, {"k": -3})])
    .text("s").name("m", "C").raw(b")\x81}b").raw(b"d").stop()
)  # fmt: skip


def test_truncation_at_every_byte() -> None:
    read(SAMPLE)
    for end in range(len(SAMPLE)):
        assert isinstance(refused(SAMPLE[:end]), TruncatedPickle), end


def test_every_single_bit_flip_reads_or_is_refused() -> None:
    refusals = 0
    for bit in range(len(SAMPLE) * 8):
        data = bytearray(SAMPLE)
        data[bit // 8] ^= 1 << bit % 8
        try:
            read(bytes(data))
        except UnreadableCheckpoint:
            refusals += 1
    assert 0 < refusals < len(SAMPLE) * 8


class PlainUnpickler(pickle._Unpickler):
    """CPython's own reader in Python, for data without names; its C twin allocates what a memo index asks for."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError("no names here")


PLAIN = {"w": [1, 2.5, None, "é", (True, {"k": -3})], "n": 10**20, "": [[], {}, ()]}


@pytest.mark.parametrize("protocol", range(6))
def test_flipped_bits_never_read_other_than_cpython_reads_them(protocol: int) -> None:
    sample = pickle.dumps([PLAIN, b"\x00" if protocol >= 3 else None], protocol)
    accepted = 0
    for bit in range(len(sample) * 8):
        data = bytearray(sample)
        data[bit // 8] ^= 1 << bit % 8
        log = GlobalLog()
        try:
            value = read(bytes(data), log).value
        except UnreadableCheckpoint:
            continue
        if not log.uses():
            accepted += 1
            assert repr(plain(value)) == repr(PlainUnpickler(io.BytesIO(data), encoding="utf-8").load())
    assert accepted > 20


OPCODES = [bytes([code]) for code in sorted({*_OPCODES, *INLINED})]


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from(OPCODES) | st.binary(max_size=6) | st.just(b"0\n"), max_size=40))
def test_random_opcodes_read_or_are_refused(parts: list[bytes]) -> None:
    with contextlib.suppress(UnreadableCheckpoint):
        read(b"".join(parts) + b".")


@pytest.mark.fuzz
def test_long_campaign_of_mutations() -> None:
    source = random.Random(7)
    seeds = [SAMPLE, *(pickle.dumps({"a": [1, (2, "x")], "b": np.arange(5)}, protocol) for protocol in range(6))]
    for _ in range(100_000):
        data = bytearray(source.choice(seeds))
        for _ in range(source.randint(1, 8)):
            data[source.randrange(len(data))] = source.choice([source.randrange(256), *b"(.0R]}bhqQ"])
        with contextlib.suppress(UnreadableCheckpoint):
            read(bytes(data))


# E: tensors


def tensor_of(data: bytes) -> TensorSpec:
    """Read one dense tensor."""
    value = read(data).value
    assert type(value) is TensorSpec
    return value


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (4,), (1,)), (1, (3,), (1,)), (0, (), ()), (3, (), ()), (0, (2, 2), (1, 2)), (0, (2**40,), (0,)),
        (0, (1, 4), (10**9, 1)), (0, (0, 2**62), (1, 1)), (9, (0,), (1,)), (0, (3, 2), (1, 1)),
        (0, (1,) * 64, (5,) * 64),
    ],
)  # fmt: skip
def test_views_inside_their_storage(offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    spec = tensor_of(Pickle().tensor(offset, shape, stride).stop())
    assert (spec.offset, spec.shape, spec.stride, spec.dtype.name) == (offset, shape, stride, "float32")


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, (4, 4), (4, 1)), (1, (4,), (1,)), (4, (), ()), (0, (2,), (4,)), (-1, (2,), (1,)), (0, (-1,), (1,)),
        (0, (2,), (-1,)), (2**63, (0,), (1,)), (0, (2**63,), (0,)), (0, (0, 2**63), (1, 1)),
        (0, (1,), (2**63,)), (0, (2, 2), (1,)), (0, (1,) * 65, (1,) * 65), (0, (1,) * 2_000, (1,) * 2_000),
        (True, (2,), (1,)), (0, (True,), (1,)), (0, (2.0,), (1,)), (0, ("4",), (1,)), (0, [4], (1,)), (0, (4,), [1]),
        (0.0, (4,), (1,)), (None, (4,), (1,)), (0, None, None), (0, (4,), (None,)), (0, (2**32, 2**32), (0, 0)),
    ],
)  # fmt: skip
def test_views_outside_their_storage_are_refused(offset: Any, shape: Any, stride: Any) -> None:
    refused(Pickle().tensor(offset, shape, stride).stop())
    stream = Pickle().name("torch._utils", "_rebuild_qtensor").mark().storage("QInt8Storage").value(offset)
    stream.value(shape).value(stride).mark().name("torch", "per_tensor_affine").value(0.5).value(0).raw(b"t")
    refused(stream.raw(b"\x89NtR").stop())


def test_sizes_in_bytes_do_not_overflow() -> None:
    refused(Pickle().tensor(0, (2**62 + 1,), (0,)).stop())  # four bytes each: 4 modulo 2**64


@pytest.mark.parametrize("numel", [True, 4.0, "4", -1, 2**63, None])
def test_declared_lengths_are_the_containers_to_check(numel: Any) -> None:
    refused(Pickle().tensor(numel=numel).stop())


def test_lazy_bits() -> None:
    spec = tensor_of(Pickle().tensor(0, (4,), (1,), {"conj": True}, dtype="ComplexFloat").stop())
    assert (spec.conj, spec.neg) == (True, False)
    for metadata in ({"conj": 1}, {"other": True}, {1: True}, "x", []):
        refused(Pickle().tensor(0, (4,), (1,), metadata).stop())


def v3(kind: str, dtype: tuple[str, str], offset: int, shape: tuple[int, ...], numel: int) -> bytes:
    """Build a call of ``_rebuild_tensor_v3``."""
    stream = (
        Pickle().name("torch._utils", "_rebuild_tensor_v3").mark().storage(kind, numel=numel, module="torch.storage")
    )
    stream.value(offset).value(shape).value((1,) * len(shape)).raw(b"\x89").call("collections", "OrderedDict")
    return stream.name(*dtype).raw(b"tR").stop()


def test_untyped_storages_are_counted_in_bytes() -> None:
    spec = tensor_of(v3("UntypedStorage", ("torch", "uint16"), 1, (3,), 8))
    assert (spec.dtype.name, spec.offset, spec.shape) == ("uint16", 1, (3,))
    assert tensor_of(v3("_UntypedStorage", ("torch", "float8_e5m2"), 0, (8,), 8)).dtype.name == "float8_e5m2"
    refused(v3("UntypedStorage", ("torch", "uint16"), 1, (4,), 8))
    refused(v3("UntypedStorage", ("torch", "uint16"), 0, (5,), 9))
    refused(v3("UntypedStorage", ("torch", "int4"), 0, (4,), 8))
    refused(v3("UntypedStorage", ("os", "system"), 0, (4,), 8))


def test_legacy_views_count_from_their_own_start() -> None:
    def view(offset: int, shape: tuple[int, ...]) -> bytes:
        stream = Pickle().name("torch._utils", "_rebuild_tensor").mark()
        stream.mark().text("storage").name("torch", "FloatStorage").text("0").text("cpu").value(10)
        return stream.value(("1", 4, 3)).raw(b"tQ").value(offset).value(shape).value((1,)).raw(b"tR").stop()

    assert tensor_of(view(1, (2,))).offset == 5
    refused(view(1, (3,)))


def test_hooks_and_attributes_are_dropped_and_noted() -> None:
    stream = Pickle().name("torch._utils", "_rebuild_parameter").mark().tensor().true()
    stream.call("collections", "OrderedDict").text("hook").name("os", "system").raw(b"stR")
    spec = tensor_of(stream.stop())
    assert (spec.is_parameter, spec.requires_grad) == (True, True)
    assert codes(stream.stop()) == ["backward-hooks"]
    smuggled = Pickle().name("torch._utils", "_rebuild_parameter_with_state").mark().tensor().true().none()
    smuggled.value({"__class__": 1}).raw(b"tR")
    assert tensor_of(smuggled.stop()).is_parameter
    assert codes(smuggled.stop()) == ["tensor-attributes"]


@pytest.mark.parametrize("create", ["R", "\x81"])
def test_parameters_of_old_torch(create: str) -> None:
    stream = Pickle().name("torch.nn.parameter", "Parameter").mark().tensor().raw(b"t").raw(create.encode("latin1"))
    assert tensor_of(stream.stop()).requires_grad
    frozen = stream.mark().raw(b"\x89\x89N").raw(b"t").build()
    assert (tensor_of(frozen.stop()).requires_grad, tensor_of(frozen.stop()).is_parameter) == (False, True)
    refused(Pickle().tensor().value({"a": 1}).build().stop())


def qtensor(scheme: str, *quantizer: Any) -> bytes:
    """Build a quantized tensor of shape (2, 2)."""
    stream = Pickle().name("torch._utils", "_rebuild_qtensor").mark().storage("QInt8Storage").value(0)
    stream.value((2, 2)).value((2, 1)).mark().name("torch", scheme)
    for value in quantizer:
        stream.value(value)
    return stream.raw(b"t\x89").call("collections", "OrderedDict").raw(b"tR").stop()


def test_quantized_tensors() -> None:
    tensor = read(qtensor("per_tensor_affine", 0.5, 3)).value
    assert (tensor.kind, tensor.dtype.name, tensor.shape) == ("quantized", "qint8", (2, 2))
    assert dict(tensor.parts)["scale"] == 0.5
    assert read(qtensor("per_channel_affine", [0.5, 0.5], [0, 0], 1)).value.detail == "per_channel_affine"
    for bad in (
        qtensor("per_channel_affine", [0.5, 0.5], [0, 0], 7),
        qtensor("per_channel_affine", [0.5, 0.5], [0, 0], -1),
        qtensor("per_channel_affine", [0.5], [0], 1),
        qtensor("per_channel_affine", [0.5, 0.5], [0], 1),
        qtensor("per_tensor_affine", "0.5", 0),
        qtensor("per_tensor_symmetric", 0.5, 0),
        Pickle().tensor(dtype="QInt8").stop(),
    ):
        refused(bad)


def sparse(layout: Any, shape: Any) -> bytes:
    """Build a sparse COO tensor of four values."""
    stream = Pickle().name("torch._utils", "_rebuild_sparse_tensor").mark()
    stream.call("torch.serialization", "_get_layout", layout).mark()
    return stream.tensor(0, (1, 4), (4, 1), dtype="Long").tensor().value(shape).true().raw(b"ttR").stop()


def test_sparse_and_meta_tensors_are_described_and_never_made() -> None:
    tensor = read(sparse("torch.sparse_coo", (10**12,))).value
    assert (tensor.kind, tensor.detail, tensor.shape, tensor.nbytes) == ("sparse", "COO", (10**12,), 48)
    for bad in (sparse("torch.sparse_xyz", (4,)), sparse("torch.sparse_coo", (-1,)), sparse("torch.sparse_csr", (4,))):
        refused(bad)
    stream = Pickle().name("torch._utils", "_rebuild_meta_tensor_no_storage").mark().name("torch", "float32")
    meta = read(stream.value((2**60,)).value((1,)).raw(b"\x89tR").stop()).value
    assert (type(meta), meta.kind, meta.nbytes) == (OpaqueTensor, "meta", 0)


def test_a_million_views_of_one_storage_take_linear_time() -> None:
    begin = Pickle().name("torch._utils", "_rebuild_tensor").put(0).pop().storage().put(1).pop().mark().get(1)
    begin.value(0).value((4,)).value((1,)).raw(b"t").put(2).pop()
    started = time.process_time()
    tensors = read(begin.raw(b"](" + b"h\x00h\x02R" * 100_000 + b"e").stop()).value
    assert time.process_time() - started < 5
    assert len({id(tensor.storage) for tensor in tensors}) == 1


def test_a_storage_without_a_tensor_is_all_its_elements() -> None:
    stream = Pickle().mark().storage().put(0).name("torch._utils", "_rebuild_tensor_v2").mark().get(0).value(0)
    bare, tensor = read(stream.value((4,)).value((1,)).raw(b"\x89NtRt").stop()).value
    assert isinstance(bare, TensorSpec)
    assert (bare.shape, bare.dtype.name, bare.storage) == ((4,), "float32", tensor.storage)


# NumPy

ARRAYS = [
    np.arange(6, dtype="<f4").reshape(2, 3), np.arange(6, dtype=">i2").reshape(3, 2), np.asfortranarray(np.eye(3)),
    np.zeros((0, 3)), np.array(3.5), np.array([True, False]), np.arange(3, dtype="u8"), np.ones(2, "f2"),
    np.array([1 + 2j], "c8"), np.array([1j], ">c16"),
]  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}{array.shape}")
def test_arrays_are_tensors_over_the_bytes_in_the_pickle(array: Any, protocol: int) -> None:
    first, second = read(pickle.dumps([array, array], protocol)).value
    assert first is second
    data = b"".join(map(bytes, first.storage.source.stream()))
    order = ">" if first.storage.big_endian else "<"
    got = np.frombuffer(data, np.dtype(first.dtype.numpy).newbyteorder(order))
    view = np.lib.stride_tricks.as_strided(
        got, first.shape, [step * first.dtype.itemsize for step in first.stride], writeable=False
    )
    assert first.is_numpy
    np.testing.assert_array_equal(view, array)
    assert set(severities(pickle.dumps(array, protocol)).values()) == {"safe"}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "number",
    [np.float32(1.5), np.float64(-2.5), np.float16(0.5), np.int64(-7), np.uint8(200), np.bool_(True), np.complex64(1j)],
    ids=repr,
)
def test_numpy_numbers_are_numbers(number: Any, protocol: int) -> None:
    got = read(pickle.dumps(number, protocol)).value
    assert (got, type(got)) == (number.item(), type(number.item()))


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_1_2_and_python_2_spellings(module: str) -> None:
    stream = Pickle().name(module, "_reconstruct").mark().name("numpy", "ndarray").value((0,)).python2_text(b"b")
    stream.raw(b"tR").put(9).mark().value(1).value((2,)).call("numpy", "dtype", "f4", 0, 1)
    stream.value((3, "<", None, None, None, -1, -1, 0)).build().raw(b"\x89").python2_text(b"\x00\x00\x80?\x00\x00\x00@")
    spec = tensor_of(stream.raw(b"t").build().stop())
    assert b"".join(map(bytes, spec.storage.source.stream())) == struct.pack("<2f", 1, 2)


def array_with(dtype: str, shape: Any, data: Any) -> bytes:
    """Build an array whose parts need not fit each other."""
    stream = Pickle().name("numpy.core.multiarray", "_reconstruct").mark().name("numpy", "ndarray").value((0,))
    stream.value(b"b").raw(b"tR").mark().value(1).value(shape).call("numpy", "dtype", dtype, False, True)
    stream.value((3, "<", None, None, None, -1, -1, 0)).build().raw(b"\x89").value(data)
    return stream.raw(b"t").build().stop()


@pytest.mark.parametrize(
    "data",
    [
        array_with("f4", (3,), b"\x00" * 8),
        array_with("f4", (10**10,), b""),
        array_with("f4", (-1,), b""),
        array_with("f4", (2.0,), b"\x00" * 8),
        array_with("f4", [2], b"\x00" * 8),
        array_with("f4", (1,) * 100, b"\x00" * 4),
        array_with("f4", (2,), None),
        Pickle().name("numpy.core.multiarray", "_reconstruct").mark().name("numpy", "ndarray").value((0,)).value(b"b")
        .raw(b"tR").stop(),
    ],
)  # fmt: skip
def test_arrays_whose_parts_do_not_fit_are_refused(data: bytes) -> None:
    refused(data)


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_objects_and_texts_stay_data(protocol: int) -> None:
    objects = pickle.dumps(np.array([{"a": 1}, None], dtype=object), protocol)
    assert severities(objects)["numpy.ndarray"] == "unknown"
    assert "object-array" in codes(objects)
    texts = read(pickle.dumps(np.array(["ab"]), protocol)).value
    assert type(texts) is Stub


def test_a_dtype_is_data() -> None:
    value = read(Pickle().name("torch", "bfloat16").stop()).value
    assert value is BY_NAME["bfloat16"]
    assert type(value) is DType
    refused(Pickle().call("torch", "bfloat16").stop())
