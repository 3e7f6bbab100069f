"""What the writers write, judged by torch, safetensors, pickle and zipfile."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tracemalloc
import zipfile
import zlib
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptool.errors import OutputRefused, PlanRefused, UnreadableCheckpoint, UnsupportedTensor
from ckptool.model.copies import CopyPlan, Extent, Payload, PlannedTensor
from ckptool.model.dtypes import BY_NAME
from ckptool.model.sources import CHUNK_BYTES, NoProgress
from ckptool.model.values import DictNode, GlobalRef, OpaqueTensor, SetNode, Stub
from ckptool.writers import WRITERS
from ckptool.writers import safetensors as safetensors_writer
from ckptool.writers.pickle import pickle_tree

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support")

DTYPES = [dtype.name for dtype in BY_NAME.values() if dtype.kind != "quantized"]
IN_SAFETENSORS = [name for name in DTYPES if BY_NAME[name].safetensors]
SHAPES = [(), (1,), (0,), (7,), (2, 3), (0, 3), (2, 0, 3), (1, 1, 1, 1, 5), (3, 1, 2)]


# --- plans by hand ---


class Memory:
    """Give bytes that a test holds, in chunks that are often odd."""

    file_range = None

    def __init__(self, data: bytes, chunk: int = CHUNK_BYTES, crc32: int | None = None) -> None:
        self.label, self.nbytes, self.data, self.chunk, self.crc32 = "memory", len(data), data, chunk, crc32

    def stream(self, offset=0, nbytes=None):
        end = self.nbytes if nbytes is None else offset + nbytes
        for start in range(offset, end, self.chunk):
            yield memoryview(self.data)[start : min(start + self.chunk, end)]


class Counted(NoProgress):
    nbytes = 0

    def advance(self, nbytes):
        self.nbytes += nbytes


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    dtype = BY_NAME[name]
    generator = torch.Generator().manual_seed(seed)
    limit = 2 if name == "bool" else 256
    data = torch.randint(0, limit, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(getattr(torch, name)).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def payload_of(dtype_name: str, data: bytes, **source) -> Payload:
    dtype = BY_NAME[dtype_name]
    extents = (Extent(Memory(data, **source), 0, len(data)),) if data else ()
    return Payload(dtype, len(data) // dtype.itemsize, extents)


def planned(tensor: torch.Tensor) -> PlannedTensor:
    name = str(tensor.dtype).removeprefix("torch.")
    return PlannedTensor(BY_NAME[name], tuple(tensor.shape), payload_of(name, bytes_of(tensor)))


def plan_of(tensors: dict[str, PlannedTensor], **options) -> CopyPlan:
    return CopyPlan(tensors, DictNode(list(tensors.items()), "OrderedDict"), **options)


def written(kind: str, plan: CopyPlan, progress=None) -> bytes:
    file = io.BytesIO()
    WRITERS[kind].write(plan, file, progress or NoProgress())
    return file.getvalue()


def torch_load(data: bytes, tmp_path: Path | None = None):
    """Read through the safe loader, mapped where there is a folder to put the file."""
    if tmp_path is None:
        return torch.load(io.BytesIO(data), weights_only=True)
    (tmp_path / "written.pt").write_bytes(data)
    return torch.load(tmp_path / "written.pt", weights_only=True, mmap=True)


def loaded_tree(root: object):
    return torch_load(written("torch", CopyPlan({}, root)))


def assert_same(found: torch.Tensor, meant: torch.Tensor) -> None:
    assert (found.dtype, found.shape, found.stride()) == (meant.dtype, meant.shape, meant.stride())
    assert bytes_of(found) == bytes_of(meant)


# --- torch: tensors ---


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", DTYPES)
def test_torch_reads_every_dtype(name, mapped, tmp_path):
    tensor = random_tensor(name, (3, 4))
    data = written("torch", plan_of({"a.weight": planned(tensor)}))
    assert_same(torch_load(data, tmp_path if mapped else None)["a.weight"], tensor)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", ["float32", "uint16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_reads_every_shape_with_its_own_strides(name, shape, mapped, tmp_path):
    tensor = random_tensor(name, shape)
    data = written("torch", plan_of({"x": planned(tensor)}))
    assert_same(torch_load(data, tmp_path if mapped else None)["x"], tensor)


def test_torch_shares_the_storage_of_tied_names_and_of_no_others():
    a, b = planned(torch.arange(6.0)), planned(torch.arange(6.0))
    view = PlannedTensor(a.dtype, (2, 3), a.payload)
    state = torch_load(written("torch", plan_of({"a": a, "again": a, "view": view, "b": b})))
    pointers = {name: tensor.untyped_storage().data_ptr() for name, tensor in state.items()}
    assert pointers["a"] == pointers["again"] == pointers["view"] != pointers["b"]
    assert torch.equal(state["view"], torch.arange(6.0).reshape(2, 3))
    assert state["a"] is not state["again"]


def test_a_tied_storage_is_written_once():
    tensor = planned(torch.zeros(10_000))
    assert len(written("torch", plan_of({"a": tensor, "b": tensor}))) < 60_000


def test_torch_loads_a_model_with_its_metadata(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = model.state_dict()
    root = DictNode([(name, planned(tensor)) for name, tensor in state.items()], "OrderedDict")
    versions = [(path, DictNode(list(entry.items()))) for path, entry in state._metadata.items()]
    root.attributes = DictNode([("_metadata", DictNode(versions, "OrderedDict")), ("items", "a trap")])
    found = torch_load(written("torch", CopyPlan({}, root)), tmp_path)
    assert type(found) is OrderedDict
    assert found.__dict__ == {"_metadata": state._metadata}
    assert list(found) == list(state)
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    other.load_state_dict(found)
    assert torch.equal(other(torch.ones(2, 3)), model(torch.ones(2, 3)))


def test_a_plain_dict_gets_no_attributes():
    root = DictNode([("a", 1)])
    root.attributes = DictNode([("_metadata", DictNode())])
    assert loaded_tree(root) == {"a": 1}


# --- torch: plain data ---

EDGES = [0, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, 1 << 63, 1 << 64, 1 << 2031]
PLAIN = {
    "none": None,
    "bools": [True, False],
    "integers": [*EDGES, *(-edge for edge in EDGES), *(~edge for edge in EDGES)],
    "floats": [0.0, -0.0, 1.5, -1e308, 5e-324, math.inf, -math.inf],
    "complex": [1j, complex(-0.0, 2.5)],
    "text": ["", "a", "é", "\0", "日本語", "\U0001f600", "\ud800", "x" * 300, "a"],
    "bytes": [b"", b"a", bytes(range(256)), b"a"],
    "lists": [[], [1], [[], [[]]], list(range(3000))],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((), ((),))],
    "dict": {"a": 1, 2: "b", None: 0, 1.5: True, b"k": [], (1, "x"): ()},
    "ordered": OrderedDict([("z", 1), ("a", 2)]),
    "counter": Counter({3: 2, 7: 1}),
    "sets": [set(), {1, "a", None, (1, 2)}],
    "empty containers": [{}, OrderedDict(), Counter()],
    "many texts": {str(index): f"value {index}" for index in range(1000)},
}


def node_of(value: object) -> object:
    """Turn plain Python values into the reader's words."""
    if isinstance(value, dict):
        return DictNode([(key, node_of(child)) for key, child in value.items()], type(value).__name__)
    if isinstance(value, set):
        return SetNode(sorted(value, key=repr))
    if isinstance(value, list | tuple):
        return type(value)(node_of(child) for child in value)
    return value


def typed(value: object) -> object:
    """Tell apart what compares equal: True and 1, dict and OrderedDict, 0.0 and -0.0."""
    if isinstance(value, dict):
        return type(value), [(typed(key), typed(child)) for key, child in value.items()]
    if isinstance(value, set):
        return type(value), sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return type(value), [typed(child) for child in value]
    return type(value), repr(value)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_data_comes_back_as_it_was(name):
    data = written("torch", CopyPlan({}, node_of({"value": PLAIN[name]})))
    assert typed(torch_load(data)["value"]) == typed(PLAIN[name])
    assert typed(pickle.loads(record(data, "data.pkl"))["value"]) == typed(PLAIN[name])


def test_not_a_number_keeps_its_bits():
    (meant,) = struct.unpack(">d", bytes.fromhex("fff8000000000123"))
    assert struct.pack(">d", loaded_tree([meant])[0]).hex() == "fff8000000000123"


@pytest.mark.parametrize("name", [*BY_NAME])
def test_dtypes_are_plain_data_too(name):
    assert loaded_tree([BY_NAME[name]]) == [getattr(torch, name)]


@pytest.mark.parametrize(("type_name", "meant"), [("defaultdict", {"a": 1}), ("dict", {"a": 1})])
def test_a_mapping_without_a_safe_class_becomes_a_dict(type_name, meant):
    assert typed(loaded_tree(DictNode([("a", 1)], type_name))) == typed(meant)


def test_a_frozenset_becomes_a_set():
    assert typed(loaded_tree(SetNode([1, 2], "frozenset"))) == typed({1, 2})


@pytest.mark.parametrize("node", [[1], DictNode([("a", 1)]), DictNode([], "OrderedDict"), SetNode([1]), (1, [2])])
def test_shared_nodes_stay_shared(node):
    first, second, third = loaded_tree([node, node, [node]])
    assert first is second is third[0]


def test_a_tree_that_doubles_at_every_level_stays_small():
    node: list = []
    for _ in range(200):
        node = [node, node]
    assert len(pickle_tree(node).data) < 4000


def test_no_nesting_is_too_deep():
    node: object = 1
    for _ in range(50_000):
        node = (DictNode([("a", [node])]),)
    found = pickle.loads(pickle_tree(node).data)
    for _ in range(50_000):
        found = found[0]["a"][0]
    assert found == 1


values = st.recursive(
    st.one_of(
        *(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False)),
        *(st.text(), st.binary(), st.complex_numbers(allow_nan=False)),
    ),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
        | st.sets(st.integers() | st.text())
    ),
)  # fmt: skip


@given(values)
@settings(max_examples=100, deadline=None)
def test_any_plain_value_comes_back(value):
    assert typed(pickle.loads(pickle_tree(node_of(value)).data)) == typed(value)


FOREIGN = {
    "a global": (GlobalRef("os", "system", "dangerous"), "os.system"),
    "an object": (Stub(GlobalRef("my", "Config\n\x1b[2J", "unknown")), r"my.Config\\n\\x1b"),
    "a sparse tensor": (OpaqueTensor("sparse", "COO", None, None), "OpaqueTensor"),
    "a live object": (object(), "object"),
    "a text subclass": (type("Name", (str,), {})("x"), "Name"),
    "a live dict": ({}, "dict"),
    "a live tensor": (torch.zeros(1), "Tensor"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("below", [lambda value: value, lambda value: DictNode([("a", [(value,)])], "OrderedDict")])
def test_foreign_objects_are_never_written(name, below):
    value, named = FOREIGN[name]
    file = io.BytesIO()
    with pytest.raises(OutputRefused, match=named):
        WRITERS["torch"].write(CopyPlan({}, below(value)), file, NoProgress())
    assert file.getvalue() == b""


@pytest.mark.parametrize("key", [[1], DictNode(), SetNode([]), (1, [2]), ((1, ([],)),)])
@pytest.mark.parametrize("hold", [lambda key: DictNode([(key, 1)]), lambda key: SetNode([key])])
def test_a_key_that_cannot_be_hashed_is_refused(key, hold):
    with pytest.raises(OutputRefused, match="as a key"):
        pickle_tree(hold(key))


def test_an_integer_that_no_loader_takes_is_refused():
    with pytest.raises(OutputRefused, match="256 bytes"):
        pickle_tree([1 << 2040])


# --- torch: the pickle and the zip around it ---


def record(data: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(f"archive/{name}")


def every_dtype() -> CopyPlan:
    return plan_of({name: planned(random_tensor(name, (2, 3))) for name in DTYPES})


def test_a_state_dict_names_only_torchs_own_functions_and_protocol_2():
    operations = list(pickletools.genops(record(written("torch", every_dtype()), "data.pkl")))
    assert max(opcode.proto for opcode, _, _ in operations) == 2
    names = {argument for opcode, argument, _ in operations if opcode.name == "GLOBAL"}
    storages = {f"torch {dtype.storage}" for dtype in BY_NAME.values() if dtype.storage}
    dtypes = {f"torch {name}" for name in BY_NAME}
    rebuilders = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch.storage UntypedStorage"}
    assert names <= storages | dtypes | rebuilders | {"collections OrderedDict"}


def test_classic_dtypes_need_nothing_new():
    classic = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    plan = plan_of({name: planned(random_tensor(name, (2,))) for name in classic})
    operations = pickletools.genops(record(written("torch", plan), "data.pkl"))
    names = {argument for opcode, argument, _ in operations if opcode.name == "GLOBAL"}
    storages = {f"torch {BY_NAME[name].storage}" for name in classic}
    assert names == storages | {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"}


def headers(file) -> list[dict[str, object]]:
    """Cut a zip into what surrounds its records, but for where they lie and what they sum up to."""
    found = []
    for info in sorted(zipfile.ZipFile(file).infolist(), key=lambda info: info.header_offset):
        file.seek(info.header_offset)
        fixed = file.read(30)
        name_bytes, extra_bytes = struct.unpack("<HH", fixed[26:])
        file.seek(name_bytes, os.SEEK_CUR)
        large, padding = file.read(extra_bytes).split(b"FB", 1)
        begin = file.tell()
        file.seek(info.file_size, os.SEEK_CUR)
        end = file.read(4)
        offset = struct.pack("<Q", info.header_offset)
        found.append(
            {
                "name": info.filename.split("/", 1)[1],
                "fixed": fixed[:26],
                "large": large.replace(offset, b"[offset]"),
                "padding": set(padding[2:]),
                "padded": int.from_bytes(padding[:2], "little") == len(padding) - 2,
                "alignment": begin % 64,
                "end": end,
                "central": info.extra.replace(offset, b"[offset]"),
                "numbers": (info.file_size, info.compress_size, info.compress_type, info.flag_bits),
                "versions": (info.create_version, info.extract_version, info.create_system, info.date_time),
                "attributes": (info.internal_attr, info.external_attr, info.comment, info.volume),
            }
        )  # fmt: skip
    return found


def torch_file(tensors: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


OURS_NOT = {".format_version", ".storage_alignment", ".data/serialization_id", "data.pkl"}


def test_records_are_laid_out_as_torch_does():
    tensors = {str(size): torch.ones(size) for size in (0, 1, 15, 16, 17, 1000)}
    ours = headers(io.BytesIO(written("torch", plan_of({name: planned(tensor) for name, tensor in tensors.items()}))))
    theirs = headers(io.BytesIO(torch_file(tensors)))
    # The last record of the file meets the directory, not another record.
    ours[-1]["end"] = theirs[-1]["end"] = b""
    assert [header for header in ours if header["name"] != "data.pkl"] == [
        header | ({"end": b""} if header["name"] == "version" else {})
        for header in theirs
        if header["name"] not in OURS_NOT
    ]
    assert ours[0] | {"numbers": 0} == theirs[0] | {"numbers": 0}


def test_the_zip_is_sound():
    archive = zipfile.ZipFile(io.BytesIO(written("torch", every_dtype())))
    assert archive.testzip() is None
    assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    assert archive.read("archive/version") == b"3\n"
    assert archive.read("archive/byteorder") == b"little"


ZEROS = memoryview(bytes(CHUNK_BYTES))


class Zeros:
    label, file_range, crc32 = "zeros", None, None

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def stream(self, offset=0, nbytes=None):
        for start in range(0, nbytes, CHUNK_BYTES):
            yield ZEROS[: min(CHUNK_BYTES, nbytes - start)]


class Sparse:
    """Leave holes where zeros are written."""

    def __init__(self, file) -> None:
        self.file = file

    def write(self, data):
        if isinstance(data, memoryview) and data.obj is ZEROS.obj:
            return self.file.seek(len(data), os.SEEK_CUR)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def zeros_planned(nbytes: int) -> PlannedTensor:
    dtype = BY_NAME["uint8"]
    return PlannedTensor(dtype, (nbytes,), Payload(dtype, nbytes, (Extent(Zeros(nbytes), 0, nbytes),)))


@pytest.mark.large
@pytest.mark.parametrize("nbytes", [(1 << 32) - 1, (1 << 32) + 5])
def test_more_than_4_gib_is_laid_out_as_torch_does(nbytes, tmp_path):
    plan = plan_of({"big": zeros_planned(nbytes), "after": planned(torch.arange(3, dtype=torch.uint8))})
    with (tmp_path / "ours.pt").open("wb") as file:
        WRITERS["torch"].write(plan, Sparse(file), NoProgress())
    assert (tmp_path / "ours.pt").stat().st_size == WRITERS["torch"].nbytes(plan)
    with torch.serialization.skip_data():
        tensors = {"big": torch.empty(nbytes, dtype=torch.uint8), "after": torch.empty(3, dtype=torch.uint8)}
        torch.save(tensors, tmp_path / "theirs.pt")
    with (tmp_path / "ours.pt").open("rb") as ours, (tmp_path / "theirs.pt").open("rb") as theirs:
        mine, meant = ([h for h in headers(file) if h["name"].startswith("data/")] for file in (ours, theirs))
        assert mine == meant
    found = torch_load_file(tmp_path / "ours.pt")
    assert found["big"].shape == (nbytes,)
    assert found["after"].tolist() == [0, 1, 2]


def torch_load_file(path: Path):
    return torch.load(path, weights_only=True, mmap=True)


def test_more_records_than_a_short_directory_counts():
    one = planned(torch.ones(1, dtype=torch.uint8))
    payloads = [Payload(one.dtype, 1, one.payload.extents) for _ in range(1 << 16)]
    tensors = {str(index): PlannedTensor(one.dtype, (1,), payload) for index, payload in enumerate(payloads)}
    data = written("torch", plan_of(tensors))
    assert len(zipfile.ZipFile(io.BytesIO(data)).infolist()) == (1 << 16) + 3
    assert data[-22:-10] == b"PK\5\6" + bytes(4) + b"\xff\xff\xff\xff"


# --- safetensors ---


def library_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    return safetensors.torch.save(tensors, metadata)


# A 4-bit scalar has no dimension to count its two halves in.
SAFE_CASES = [
    (name, shape) for name in IN_SAFETENSORS for shape in SHAPES if shape or BY_NAME[name].safetensors != "F4"
]


@pytest.mark.parametrize(("name", "shape"), SAFE_CASES)
def test_safetensors_is_byte_identical_to_the_library(name, shape):
    tensor = random_tensor(name, shape)
    assert written("safetensors", plan_of({"x": planned(tensor)})) == library_bytes({"x": tensor})


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {'a\x00\n\x7f\u2028é"\\/': "b\x1f\t\b\f😀"}])
def test_many_tensors_and_metadata_are_byte_identical_to_the_library(metadata):
    names = [name for name in IN_SAFETENSORS for _ in range(2)]
    tensors = {f"{'zab'[i % 3]}.{i}": random_tensor(name, (i % 4, 2), i) for i, name in enumerate(names)}
    plan = plan_of({name: planned(tensor) for name, tensor in tensors.items()}, metadata=metadata)
    assert written("safetensors", plan) == library_bytes(tensors, metadata or None)


NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20).filter(lambda name: name != "__metadata__")
TENSORS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(IN_SAFETENSORS[:9]), st.sampled_from(SHAPES[1:])), max_size=6
)


@given(TENSORS)
@settings(max_examples=100, deadline=None)
def test_any_names_are_byte_identical_to_the_library(described):
    tensors = {
        name: random_tensor(dtype, shape, index) for index, (name, (dtype, shape)) in enumerate(described.items())
    }
    plan = plan_of({name: planned(tensor) for name, tensor in tensors.items()})
    assert written("safetensors", plan) == library_bytes(tensors)


def test_safetensors_metadata_is_sorted():
    metadata = {key: key.upper() for key in "zebra"}
    data = written("safetensors", plan_of({"x": planned(torch.ones(2))}, metadata=metadata))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header) == ["__metadata__", "x"]
    assert list(header["__metadata__"].items()) == [("a", "A"), ("b", "B"), ("e", "E"), ("r", "R"), ("z", "Z")]


def test_aliases_are_left_out_of_safetensors(tmp_path):
    tensor = planned(torch.ones(2, 2))
    plan = plan_of({"b": tensor, "a": tensor}, metadata={"a": "b"}, aliases={"a": "b"})
    (tmp_path / "x.safetensors").write_bytes(written("safetensors", plan))
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert list(file.keys()) == ["b"]
        assert file.metadata() == {"a": "b"}
        assert torch.equal(file.get_tensor("b"), torch.ones(2, 2))


def test_tied_tensors_without_an_alias_are_written_twice():
    tensor = planned(torch.arange(4.0))
    found = safetensors.torch.load(written("safetensors", plan_of({"a": tensor, "b": tensor})))
    assert {name: value.tolist() for name, value in found.items()} == {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}


def refuse(plan: CopyPlan, error: type[Exception], match: str) -> str:
    file = io.BytesIO()
    with pytest.raises(error, match=match) as refusal:
        WRITERS["safetensors"].write(plan, file, NoProgress())
    with pytest.raises(error, match=match):
        WRITERS["safetensors"].nbytes(plan)
    assert file.getvalue() == b""
    assert str(refusal.value).isprintable()
    return str(refusal.value)


NOT_IN_SAFETENSORS = [*((name, (2,)) for name in DTYPES if not BY_NAME[name].safetensors), ("float4_e2m1fn_x2", ())]


@pytest.mark.parametrize(("name", "shape"), NOT_IN_SAFETENSORS)
def test_a_tensor_that_safetensors_cannot_hold_is_named(name, shape):
    plan = plan_of({"a": planned(torch.ones(1)), "b.weight": planned(random_tensor(name, shape))})
    assert f'"b.weight" is {name} of shape {shape}' in refuse(plan, UnsupportedTensor, r"write a \.pt file")


@pytest.mark.parametrize("name", ["__metadata__", "a\x00", "\x1b[2J", "a\nb", "\x7f", "\x9b", "\ud800", "x\udfff"])
def test_a_name_that_safetensors_cannot_carry_is_refused(name):
    refuse(plan_of({name: planned(torch.ones(1))}), PlanRefused, "has a name that a safetensors file cannot carry")


def test_metadata_that_is_no_unicode_is_refused():
    refuse(plan_of({"a": planned(torch.ones(1))}, metadata={"k": "\ud800"}), OutputRefused, "--no-metadata")


def test_a_header_that_readers_refuse_is_refused(monkeypatch):
    monkeypatch.setattr(safetensors_writer, "_MAX_HEADER_BYTES", 1000)
    refuse(plan_of({"a": planned(torch.ones(1))}, metadata={"k": "x" * 1000}), OutputRefused, "readers accept 1000")


# --- both ---

KINDS = sorted(WRITERS)


def tensors_in(kind: str, data: bytes) -> dict[str, torch.Tensor]:
    return torch_load(data) if kind == "torch" else safetensors.torch.load(data)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_plan_is_an_empty_file_of_its_kind(kind):
    assert tensors_in(kind, written(kind, plan_of({}))) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_is_known_beforehand(kind):
    plan = plan_of({f"x{size}": planned(torch.ones(size)) for size in range(70)}, metadata={"format": "pt"})
    assert WRITERS[kind].nbytes(plan) == len(written(kind, plan))


@pytest.mark.parametrize("kind", KINDS)
def test_progress_counts_every_byte_once(kind):
    progress = Counted()
    tensor = planned(torch.ones(CHUNK_BYTES))
    written(kind, plan_of({"a": tensor, "b": planned(torch.ones(3)), "empty": planned(torch.ones(0))}), progress)
    assert progress.nbytes == 4 * CHUNK_BYTES + 12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 64, CHUNK_BYTES])
def test_extents_are_joined_and_summed_up(kind, chunk):
    content = bytes(range(256)) * 4
    source = Memory(content, chunk)
    cuts = [(100, 3), (0, 256), (1000, 24), (5, 1), (512, 0), (0, 228)]
    payload = Payload(BY_NAME["uint8"], 512, tuple(Extent(source, offset, nbytes) for offset, nbytes in cuts))
    meant = b"".join(content[offset : offset + nbytes] for offset, nbytes in cuts)
    plan = plan_of({"x": PlannedTensor(BY_NAME["uint8"], (512,), payload)})
    file = io.BytesIO()
    checksums = WRITERS[kind].write(plan, file, NoProgress())
    assert bytes_of(tensors_in(kind, file.getvalue())["x"]) == meant
    assert checksums == {payload: zlib.crc32(meant)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checksum_is_given_for_every_payload(kind):
    plan = plan_of(
        {name: planned(random_tensor(name, (5, 3))) for name in IN_SAFETENSORS} | {"0": planned(torch.ones(0))}
    )
    checksums = WRITERS[kind].write(plan, io.BytesIO(), NoProgress())
    assert checksums == {
        tensor.payload: zlib.crc32(b"".join(extent.source.data for extent in tensor.payload.extents))
        for tensor in plan.tensors.values()
    }


STORED = 0x12345678  # not the checksum of these bytes: it shows whether the stored one was taken
CONTENT = bytes(range(64))
EXTENTS = {
    "whole": (((0, 64),), STORED),
    "front": (((0, 60),), zlib.crc32(CONTENT[:60])),
    "back": (((4, 60),), zlib.crc32(CONTENT[4:])),
    "twice": (((0, 64), (0, 64)), zlib.crc32(CONTENT * 2)),
    "halves": (((0, 32), (32, 32)), zlib.crc32(CONTENT)),
}


@pytest.mark.parametrize("name", EXTENTS)
def test_the_checksum_of_a_whole_source_is_taken_over(name):
    cuts, meant = EXTENTS[name]
    source = Memory(CONTENT, crc32=STORED)
    payload = Payload(BY_NAME["uint8"], sum(n for _, n in cuts), tuple(Extent(source, *cut) for cut in cuts))
    plan = plan_of({"x": PlannedTensor(payload.dtype, (payload.numel,), payload)})
    assert WRITERS["torch"].write(plan, io.BytesIO(), NoProgress()) == {payload: meant}


class Unreliable(Memory):
    def __init__(self, gives: bytes) -> None:
        super().__init__(bytes(100))
        self.gives = gives

    def stream(self, offset=0, nbytes=None):
        yield memoryview(self.gives)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given_bytes", [0, 99, 101])
def test_a_source_that_gives_another_number_of_bytes_is_refused(kind, given_bytes):
    payload = Payload(BY_NAME["uint8"], 100, (Extent(Unreliable(bytes(given_bytes)), 0, 100),))
    with pytest.raises(UnreadableCheckpoint, match="memory: gave another number of bytes than the 100"):
        written(kind, plan_of({"x": PlannedTensor(BY_NAME["uint8"], (100,), payload)}))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_does_not_grow_with_the_tensors(kind):
    plan = plan_of({"a": zeros_planned(256 << 20), "b": zeros_planned(256 << 20)})
    with Path(os.devnull).open("wb") as sink:
        tracemalloc.start()
        WRITERS[kind].write(plan, sink, NoProgress())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


DIGESTS = """
import hashlib, io
from ckptool.model.dtypes import BY_NAME
from ckptool.model.copies import CopyPlan, Payload, PlannedTensor
from ckptool.model.sources import NoProgress
from ckptool.model.values import DictNode, SetNode
from ckptool.writers import WRITERS
tensors = {n: PlannedTensor(d, (0,), Payload(d, 0, ())) for n, d in BY_NAME.items() if d.safetensors}
root = DictNode([("tags", SetNode(["b", "a", "c"])), ("state_dict", DictNode([*tensors.items()], "OrderedDict"))])
plan = CopyPlan(tensors, root, metadata={key: key for key in {"format", "x", "y", "z", "license"}})
for writer in WRITERS.values():
    writer.write(plan, file := io.BytesIO(), NoProgress())
    print(hashlib.sha256(file.getvalue()).hexdigest())
"""


def test_the_same_input_gives_the_same_bytes():
    environments = [{"PYTHONHASHSEED": "1", "TZ": "UTC"}, {"PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo", "LC_ALL": "C"}]
    outputs = [
        subprocess.check_output([sys.executable, "-c", DIGESTS], env=os.environ | env, cwd=Path(__file__).parents[1])
        for env in environments
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].count(b"\n") == 2
