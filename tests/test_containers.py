"""What torch and safetensors wrote is described as they load it themselves: names, dtypes, shapes, bits."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.crafted import FOUR_FLOATS, Rebuilt, archived, legacy, members_of, named, safetensors_file, unzipped
from support.tensors import bits, materialise, same, storage_bytes, tensors_of, torch_bytes

from ckptool.errors import ChecksumMismatch, UnreadableCheckpoint
from ckptool.formats import open_checkpoint
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.dtypes import BY_NAME, BY_SAFETENSORS
from ckptool.model.sources import CHUNK_BYTES
from ckptool.model.values import OpaqueTensor, Stub, TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore")

DENSE = [name for name, dtype in BY_NAME.items() if dtype.kind != "quantized"]
LEGACY = {"_use_new_zipfile_serialization": False}
# torch writes these into a legacy stream, but does not read them back.
NOT_IN_LEGACY = {name for name in DENSE if BY_NAME[name].storage is None}


def pattern(name: str, *shape: int) -> torch.Tensor:
    """Fill a tensor of any dtype with bytes that all differ from their neighbours."""
    dtype = BY_NAME[name]
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = (torch.arange(count) * 37 % 251).to(torch.uint8)
    return (raw % 2 if name == "bool" else raw).view(getattr(torch, name)).reshape(shape)


def open_bytes(folder: Path, data: bytes, name: str = "model.pt") -> Checkpoint:
    path = folder / name
    path.write_bytes(data)
    return open_checkpoint(path)


@pytest.mark.parametrize("name", DENSE)
def test_every_dense_dtype_of_a_zip(tmp_path: Path, name: str) -> None:
    data = torch_bytes({"w": pattern(name, 2, 3), "one": pattern(name, 1)[0]})
    expected = torch.load(io.BytesIO(data), weights_only=True)
    with open_bytes(tmp_path, data) as checkpoint:
        found = tensors_of(checkpoint)
        assert {key: same(spec, expected[key]) for key, spec in found.items()} == {"w": True, "one": True}


@pytest.mark.parametrize("name", DENSE)
def test_every_dense_dtype_of_a_legacy_stream(tmp_path: Path, name: str) -> None:
    tensor = pattern(name, 2, 3)
    data = torch_bytes({"w": tensor}, **LEGACY)
    expected = tensor if name in NOT_IN_LEGACY else torch.load(io.BytesIO(data), weights_only=True)["w"]
    with open_bytes(tmp_path, data) as checkpoint:
        assert checkpoint.format == "torch-legacy"
        assert same(tensors_of(checkpoint)["w"], expected)


@pytest.mark.parametrize("name", [dtype.name for dtype in BY_SAFETENSORS.values()])
def test_every_dtype_of_safetensors(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"w": pattern(name, 2, 4), "empty": pattern(name, 0, 4)}, path, {"format": "pt"})
    expected = safetensors.torch.load_file(path)
    with open_checkpoint(path) as checkpoint:
        found = tensors_of(checkpoint)
        assert {key: same(spec, expected[key]) for key, spec in found.items()} == {"w": True, "empty": True}
        assert checkpoint.metadata == {"format": "pt"}


def shared() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0)
    return {"all": base, "rows": base.view(4, 6)[1:3], "tail": base[20:], "same": base}


VIEWS: dict[str, Callable[[], Any]] = {
    "zero-dimensional": lambda: {"w": torch.tensor(3.5)},
    "empty": lambda: {"w": torch.empty(0), "v": torch.empty(3, 0, 2)},
    "transposed": lambda: {"w": torch.arange(6.0).view(2, 3).t()},
    "channels-last": lambda: {"w": torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)},
    "stepped": lambda: {"w": torch.arange(20.0)[3::4]},
    "expanded": lambda: {"w": torch.arange(3.0).view(3, 1).expand(3, 5)},
    "overlapping": lambda: {"w": torch.arange(8.0).as_strided((3, 4), (2, 1))},
    "large-stride-of-one": lambda: {"w": torch.arange(4.0).as_strided((1, 4), (10**9, 1))},
    "slack": lambda: {"w": torch.arange(1000.0)[500:502]},
    "conjugated": lambda: {"w": torch.complex(torch.arange(3.0), torch.ones(3)).conj()},
    "negated": lambda: {"w": torch.complex(torch.arange(3.0), torch.ones(3)).conj().imag},
    "parameter": lambda: {"w": torch.nn.Parameter(torch.ones(3))},
    "frozen-parameter": lambda: {"w": torch.nn.Parameter(torch.ones(3), requires_grad=False)},
    "gradient": lambda: {"w": torch.ones(3, requires_grad=True)},
    "shared": shared,
    "nan-payload": lambda: {"w": torch.tensor([0x7F800001, -1, 1 << 31], dtype=torch.int64).int().view(torch.float32)},
    "state-dict": lambda: torch.nn.BatchNorm2d(3).state_dict(),
    "odd-names": lambda: {"": torch.ones(1), "a.\n\x1b[2J": torch.ones(2), "\u00e9\u202e": torch.ones(3)},
}


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", VIEWS)
def test_views(tmp_path: Path, case: str, options: dict[str, Any]) -> None:
    data = torch_bytes(VIEWS[case](), **options)
    expected = torch.load(io.BytesIO(data), weights_only=True)
    with open_bytes(tmp_path, data) as checkpoint:
        found = tensors_of(checkpoint)
        assert list(found) == list(expected)
        for key, tensor in expected.items():
            spec = found[key]
            assert same(spec, tensor)
            assert (spec.stride, spec.offset) == (tensor.stride(), tensor.storage_offset())
            assert (spec.conj, spec.neg) == (tensor.is_conj(), tensor.is_neg())
            assert spec.requires_grad == tensor.requires_grad
            assert spec.is_parameter == isinstance(tensor, torch.nn.Parameter)
            assert spec.is_contiguous == tensor.is_contiguous()


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_ties_are_one_storage(tmp_path: Path, options: dict[str, Any]) -> None:
    with open_bytes(tmp_path, torch_bytes(shared() | {"other": torch.arange(24.0)}, **options)) as checkpoint:
        found = tensors_of(checkpoint)
        assert len({id(found[name].storage) for name in ("all", "rows", "tail", "same")}) == 1
        assert found["other"].storage is not found["all"].storage
        assert found["all"].view_key == found["same"].view_key != found["rows"].view_key
        assert len(checkpoint.storages) == 2


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_pickle_protocols(tmp_path: Path, protocol: int, options: dict[str, Any]) -> None:
    expected = {f"layer.{index}.weight": torch.full((2, 2), float(index)) for index in range(300)}
    with open_bytes(tmp_path, torch_bytes(expected, pickle_protocol=protocol, **options)) as checkpoint:
        found = tensors_of(checkpoint)
        assert list(found) == list(expected)
        assert all(same(spec, expected[key]) for key, spec in found.items())


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_legacy_object_longer_than_the_first_read(tmp_path: Path, protocol: int) -> None:
    value = {"text": "x" * 3_000_000, "w": torch.arange(5.0), "more": ["y" * 1000] * 10}
    with open_bytes(tmp_path, torch_bytes(value, pickle_protocol=protocol, **LEGACY)) as checkpoint:
        assert checkpoint.root.get("text") == value["text"]
        assert same(tensors_of(checkpoint)["w"], value["w"])


@pytest.mark.parametrize("stem", ["model", "epoch=3-step=12", "no\u00ebl \u96ea", "a.b.c", "[x]", " "])
def test_any_root_name(tmp_path: Path, stem: str) -> None:
    members = unzipped(torch_bytes({"w": torch.arange(3.0)}))
    data = archived({name.replace("archive", stem, 1): data for name, data in members.items()})
    with open_bytes(tmp_path, data) as checkpoint:
        assert same(tensors_of(checkpoint)["w"], torch.arange(3.0))
        assert checkpoint.facts["root"] == stem


def test_big_endian_untyped_storages_are_refused(tmp_path: Path) -> None:
    """Refuse what torch itself reads without swapping it."""
    members = unzipped(torch_bytes({"w": pattern("uint16", 3)})) | {"archive/byteorder": b"big"}
    with pytest.raises(UnreadableCheckpoint, match="untyped bytes of a big-endian machine"):
        open_bytes(tmp_path, archived(members))


def test_what_a_zip_says_of_itself(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": torch.arange(3.0), "epoch": 4}, path)
    with zipfile.ZipFile(path) as archive:
        crc = archive.getinfo("model/data/0").CRC
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "torch-zip"
        assert checkpoint.path == path
        assert checkpoint.file_bytes == path.stat().st_size
        assert checkpoint.root.get("epoch") == 4
        assert checkpoint.facts == {"root": "model", "version": "3", "byteorder": "little", "format_version": "1"}
        assert checkpoint.findings == ()
        assert {use.ref.full_name for use in checkpoint.globals} == {
            "torch._utils._rebuild_tensor_v2",
            "torch.FloatStorage",
            "collections.OrderedDict",
        }
        (storage,) = checkpoint.storages
        assert (storage.key, storage.nbytes, storage.location) == ("0", 12, "cpu")
        assert storage.source.crc32 == crc
        assert storage.source.label == f"{path}: model/data/0"
        place = storage.source.file_range
        assert place is not None
        assert path.read_bytes()[place.offset :][: place.nbytes] == struct.pack("<3f", 0, 1, 2)


@pytest.mark.parametrize("location", ["cuda:99", "meta", "xla", "\x1b[2J"])
def test_locations_are_facts(tmp_path: Path, location: str) -> None:
    data = archived(members_of({"w": Rebuilt(named(location=location))}, _0=FOUR_FLOATS))
    with open_bytes(tmp_path, data) as checkpoint:
        assert tensors_of(checkpoint)["w"].storage.location == location
        assert materialise(tensors_of(checkpoint)["w"]).tolist() == [1, 2, 3, 4]


def test_deflated_rewrite(tmp_path: Path) -> None:
    expected = {"w": torch.arange(400_000.0), "half": torch.arange(9).half(), "empty": torch.empty(0)}
    members = unzipped(torch_bytes(expected))
    data = archived(members, zipfile.ZIP_DEFLATED)
    with open_bytes(tmp_path, data) as checkpoint:
        found = tensors_of(checkpoint)
        assert all(same(spec, expected[key]) for key, spec in found.items())
        assert found["w"].storage.source.file_range is None
        assert found["w"].storage.source.crc32 is not None
        assert {finding.code for finding in checkpoint.findings} == {"compressed"}
        assert checkpoint.facts["compressed"] == f"{len(members)} of {len(members)} records"
        part = b"".join(bytes(chunk) for chunk in found["w"].storage.source.stream(1_200_004, 16))
        assert part == struct.pack("<4f", 300_001, 300_002, 300_003, 300_004)


def test_rezipped_with_folder_entries(tmp_path: Path) -> None:
    """Read what ``zip -r`` makes of an unpacked checkpoint."""
    members = {"archive/": b"", "archive/data/": b""} | unzipped(torch_bytes({"w": torch.arange(3.0)}))
    with open_bytes(tmp_path, archived(members, zipfile.ZIP_DEFLATED)) as checkpoint:
        assert same(tensors_of(checkpoint)["w"], torch.arange(3.0))


def test_streamed_zip_with_descriptors(tmp_path: Path) -> None:
    """Read what Python writes to a pipe: sizes only in descriptors, some of 64 bits."""

    class Pipe(io.RawIOBase):
        def __init__(self) -> None:
            self.data = bytearray()

        def write(self, data: Any) -> int:
            self.data += data
            return len(data)

        def writable(self) -> bool:
            return True

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:  # type: ignore[call-overload]
        for index, (name, data) in enumerate(unzipped(torch_bytes({"w": torch.arange(3.0)})).items()):
            with archive.open(name, "w", force_zip64=bool(index % 2)) as member:
                member.write(data)
    with open_bytes(tmp_path, bytes(pipe.data)) as checkpoint:
        assert same(tensors_of(checkpoint)["w"], torch.arange(3.0))


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int64", "complex64", "complex128", "bool"])
def test_big_endian(tmp_path: Path, name: str) -> None:
    tensor = pattern(name, 2, 3)
    members = unzipped(torch_bytes({"w": tensor}))
    size = BY_NAME[name].swap_size
    raw = members["archive/data/0"]
    members["archive/data/0"] = b"".join(raw[at : at + size][::-1] for at in range(0, len(raw), size))
    members["archive/byteorder"] = b"big"
    data = archived(members)
    expected = torch.load(io.BytesIO(data), weights_only=True)["w"]
    assert bits(expected) == bits(tensor)
    with open_bytes(tmp_path, data) as checkpoint:
        assert tensors_of(checkpoint)["w"].storage.big_endian
        assert same(tensors_of(checkpoint)["w"], expected)
        assert checkpoint.facts["byteorder"] == "big"


def test_without_byteorder_and_extras(tmp_path: Path) -> None:
    """Read what torch 1.6 to 2.0 wrote: three kinds of records, little-endian."""
    members = unzipped(torch_bytes({"w": torch.arange(3.0)}))
    old = {name: data for name, data in members.items() if name.count("/.") == 0 and "byteorder" not in name}
    with open_bytes(tmp_path, archived(old)) as checkpoint:
        assert same(tensors_of(checkpoint)["w"], torch.arange(3.0))
        assert checkpoint.facts == {"root": "archive", "version": "3"}
        assert checkpoint.findings == ()


@pytest.mark.large
def test_sixty_four_bits(tmp_path: Path) -> None:
    """Place storages behind 4 GiB as torch does; the file is sparse."""
    path = tmp_path / "big.pt"
    with torch.serialization.skip_data():
        torch.save({"a": torch.empty(3), "big": torch.empty(5 << 30, dtype=torch.uint8), "c": torch.empty(7)}, path)
    places = torch._C.PyTorchFileReader(str(path))
    with open_checkpoint(path) as checkpoint:
        for storage, nbytes in zip(checkpoint.storages, (12, 5 << 30, 28), strict=True):
            place = storage.source.file_range
            assert place is not None
            assert place.offset == places.get_record_offset(f"data/{storage.key}")
            assert storage.nbytes == place.nbytes == nbytes
        assert [finding.code for finding in checkpoint.findings] == ["no-checksums"]
        assert bits(materialise(tensors_of(checkpoint)["c"])) == bytes(28)


def test_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        data = torch_bytes({"w": torch.arange(3.0)})
    finally:
        torch.serialization.set_crc32_options(True)
    with open_bytes(tmp_path, data) as checkpoint:
        assert checkpoint.storages[0].source.crc32 is None
        assert same(tensors_of(checkpoint)["w"], torch.arange(3.0))
        assert [finding.code for finding in checkpoint.findings] == ["no-checksums"]


def test_what_torch_does_not_read_is_listed(tmp_path: Path) -> None:
    members = unzipped(torch_bytes({"w": torch.arange(3.0)}))
    extra = {"data/7": b"hidden", "evil.pkl": b".", "run.py": b"print()", "notes.txt": b"x", "data/a/b": b""}
    members |= {f"archive/{name}": data for name, data in extra.items()}
    with open_bytes(tmp_path, archived(members)) as checkpoint:
        assert [finding.code for finding in checkpoint.findings] == [
            "unreferenced-storage",
            "extra-pickle",
            "extra-code",
            "extra-member",
        ]
        assert [storage.key for storage in checkpoint.storages] == ["0", "7"]
        assert b"".join(checkpoint.storages[1].source.stream()) == b"hidden"


def test_a_whole_module_is_a_stub(tmp_path: Path) -> None:
    with open_bytes(tmp_path, torch_bytes(torch.nn.Linear(2, 2))) as checkpoint:
        assert isinstance(checkpoint.root, Stub)
        assert "torch.nn.modules.linear.Linear" in {use.ref.full_name for use in checkpoint.globals}


def test_a_legacy_module_with_its_source(tmp_path: Path) -> None:
    with open_bytes(tmp_path, torch_bytes(torch.nn.Linear(2, 2), **LEGACY)) as checkpoint:
        assert isinstance(checkpoint.root, Stub)
        assert len(checkpoint.storages) == 2


def test_four_bit_floats_count_bytes(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F4","shape":[2,6],"data_offsets":[0,6]}}'
    with open_bytes(tmp_path, safetensors_file(header, b"abcdef")) as checkpoint:
        spec = tensors_of(checkpoint)["w"]
        assert (spec.dtype.name, spec.shape, spec.nbytes) == ("float4_e2m1fn_x2", (2, 3), 6)
        expected = safetensors.torch.load_file(checkpoint.path)["w"]
        assert same(spec, expected)


@pytest.mark.parametrize("name", ["F6_E2M3", "F6_E3M2"])
def test_six_bit_floats_are_named(tmp_path: Path, name: str) -> None:
    header = b'{"w":{"dtype":"%s","shape":[4],"data_offsets":[0,3]}}' % name.encode()
    with open_bytes(tmp_path, safetensors_file(header, b"abc")) as checkpoint:
        opaque = checkpoint.root.get("w")
        assert isinstance(opaque, OpaqueTensor)
        assert (opaque.kind, opaque.detail, opaque.shape, opaque.nbytes) == ("packed", name, (4,), 3)


SAFETENSORS_ODDITIES = {
    "no-tensors": (safetensors_file("{}"), []),
    "only-metadata": (safetensors_file('{"__metadata__":{"a":"b"}}'), []),
    "null-metadata": (safetensors_file('{"__metadata__":null}'), []),
    "leading-space": (
        safetensors_file(' {"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        ["leading-space"],
    ),
    "trailing-space": (safetensors_file('{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}   ', b"x"), []),
    "unknown-field": (
        safetensors_file('{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":1}}', b"x"),
        ["unknown-fields"],
    ),
    "unaligned": (
        safetensors_file(
            '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F64","shape":[],"data_offsets":[1,9]}}',
            bytes(9),
        ),
        [],
    ),
    "out-of-order": (
        safetensors_file(
            '{"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"ab",
        ),
        [],
    ),
    "minus-in-a-name": (safetensors_file('{"x,-0":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), []),
    "escaped-name": (safetensors_file('{"\\ud83d\\ude00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"), []),
}


@pytest.mark.parametrize("case", SAFETENSORS_ODDITIES)
def test_odd_safetensors_that_the_library_reads(tmp_path: Path, case: str) -> None:
    data, codes = SAFETENSORS_ODDITIES[case]
    expected = safetensors.torch.load(data)
    with open_bytes(tmp_path, data) as checkpoint:
        found = tensors_of(checkpoint)
        assert found.keys() == expected.keys()
        assert all(same(found[key], tensor) for key, tensor in expected.items())
        assert [finding.code for finding in checkpoint.findings] == codes


def test_legacy_views_of_one_storage(tmp_path: Path) -> None:
    """Read what torch 0.1 and 0.2 wrote: a view has a name, an offset and a size within its storage."""
    storage = torch.FloatStorage
    value = {
        "whole": Rebuilt(("storage", storage, "7", "cpu", 4, None)),
        "part": Rebuilt(("storage", storage, "7", "cpu", 4, ("8", 1, 3)), size=(2,), offset=1),
    }
    data = legacy(value, ["7"], [(4, FOUR_FLOATS)])
    expected = torch.load(io.BytesIO(data), weights_only=True)
    assert expected["part"].tolist() == [3, 4]
    with open_bytes(tmp_path, data) as checkpoint:
        found = tensors_of(checkpoint)
        assert all(same(found[name], tensor) for name, tensor in expected.items())
        assert found["whole"].storage is found["part"].storage


def test_bytes_come_in_chunks(tmp_path: Path) -> None:
    tensor = torch.arange(700_000.0)
    with open_bytes(tmp_path, torch_bytes({"w": tensor})) as checkpoint:
        source = tensors_of(checkpoint)["w"].storage.source
        sizes = [len(chunk) for chunk in source.stream()]
        assert sum(sizes) == source.nbytes == 2_800_000
        assert max(sizes) <= CHUNK_BYTES
        assert b"".join(bytes(chunk) for chunk in source.stream(8, 4)) == struct.pack("<f", 2)
        assert list(source.stream(8, 0)) == []
        first, second = source.stream(), source.stream(4)
        assert bytes(next(first)[:4]) == struct.pack("<f", 0)
        kept = next(first)
        assert bytes(next(second)[:4]) == struct.pack("<f", 1)
        assert bytes(kept[:4]) == struct.pack("<f", CHUNK_BYTES // 4)


@pytest.mark.parametrize("outside", [(-1, 1), (0, 13), (12, 1), (5, -1)])
def test_ranges_outside_a_source_are_refused(tmp_path: Path, outside: tuple[int, int]) -> None:
    with (
        open_bytes(tmp_path, torch_bytes({"w": torch.arange(3.0)})) as checkpoint,
        pytest.raises(UnreadableCheckpoint, match="lie outside its 12"),
    ):
        list(checkpoint.storages[0].source.stream(*outside))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_values_are_noticed_before_the_last_chunk(tmp_path: Path, method: int) -> None:
    tensor = torch.arange(700_000.0)
    data = bytearray(archived(unzipped(torch_bytes({"w": tensor})), method))
    with open_bytes(tmp_path, bytes(data)) as checkpoint:
        place = checkpoint.storages[0].source
    # Wrong checksums in both headers stand for wrong bytes, whatever the method.
    crc = struct.pack("<I", place.crc32 or 0)
    damaged = bytes(data).replace(crc, struct.pack("<I", 0xDEADBEEF))
    with open_bytes(tmp_path, damaged) as checkpoint:
        source = checkpoint.storages[0].source
        passed: list[int] = []
        with pytest.raises(ChecksumMismatch) as refused:
            passed.extend(map(len, source.stream()))
        assert 0 < sum(passed) < source.nbytes
        message = "its bytes do not match their stored checksum; get the file again"
        assert str(refused.value) == f"{source.label}: {message}"
        with pytest.raises(ChecksumMismatch):
            next(source.stream(4, 4))


def test_a_flipped_byte_of_a_storage(tmp_path: Path) -> None:
    data = bytearray(torch_bytes({"w": torch.arange(3.0)}))
    data[data.index(struct.pack("<3f", 0, 1, 2))] ^= 1
    with open_bytes(tmp_path, bytes(data)) as checkpoint, pytest.raises(ChecksumMismatch):
        storage_bytes(tensors_of(checkpoint)["w"])


def test_a_flipped_byte_of_the_pickle_hides_no_global(tmp_path: Path) -> None:
    data = bytearray(torch_bytes({"epoch": 4, "w": torch.arange(3.0)}))
    data[data.index(b"epoch")] ^= 1
    with pytest.raises(ChecksumMismatch, match=r"data\.pkl' do not match their stored checksum") as refused:
        open_bytes(tmp_path, bytes(data))
    assert "torch._utils._rebuild_tensor_v2" in {use.ref.full_name for use in refused.value.globals}


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    with open_bytes(tmp_path, torch_bytes({"w": torch.arange(3.0)})) as checkpoint:
        checkpoint.path.open("ab").write(b"x")
        with pytest.raises(UnreadableCheckpoint, match="the file changed while it was read; wait until it is written"):
            list(checkpoint.storages[0].source.stream())


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    with open_bytes(tmp_path, torch_bytes({"w": torch.arange(3_000_000.0)})) as checkpoint:
        with checkpoint.path.open("r+b") as file:
            file.truncate(2_000_000)
        with pytest.raises(UnreadableCheckpoint, match="the file ends at byte 2000000"):
            list(checkpoint.storages[0].source.stream())


def test_a_closed_checkpoint_reads_nothing(tmp_path: Path) -> None:
    checkpoint = open_bytes(tmp_path, torch_bytes({"w": torch.arange(3.0)}))
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(UnreadableCheckpoint, match="it cannot be read"):
        list(checkpoint.storages[0].source.stream())


def test_a_replaced_file_stays_readable(tmp_path: Path) -> None:
    """Keep reading the old content when an output is renamed over the input."""
    with open_bytes(tmp_path, torch_bytes({"w": torch.arange(3.0)})) as checkpoint:
        other = tmp_path / "other"
        other.write_bytes(b"something else")
        other.replace(checkpoint.path)
        assert same(tensors_of(checkpoint)["w"], torch.arange(3.0))


@st.composite
def state_dicts(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Draw state dicts with tensors of any dtype, strided, offset and shared as torch allows."""
    result = {}
    for name in draw(st.lists(st.text(max_size=8), unique=True, max_size=5)):
        dtype = draw(st.sampled_from(DENSE))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        base = pattern(dtype, 400)
        strides = draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
        result[name] = base.as_strided(shape, strides, draw(st.integers(0, 9)))
        if draw(st.booleans()):
            result[name + "'"] = base.as_strided((3, 3), (1, 2))
    return result


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=state_dicts(), legacy=st.booleans())
def test_any_state_dict(tmp_path: Path, state: dict[str, torch.Tensor], legacy: bool) -> None:
    data = torch_bytes(state, _use_new_zipfile_serialization=not legacy)
    with open_bytes(tmp_path, data) as checkpoint:
        found = tensors_of(checkpoint)
        assert list(found) == list(state)
        assert all(same(found[name], tensor) for name, tensor in state.items())
        assert all(isinstance(spec, TensorSpec) for spec in found.values())
