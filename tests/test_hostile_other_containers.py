"""Programs, arrays, archives and compressed files that lie are refused in one sentence, and nothing is run."""

from __future__ import annotations

import bz2
import collections
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import tempfile
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from support.containers import (
    CODE,
    exported_entry,
    exported_members,
    npy,
    npy_with,
    npz,
    old_script_members,
    script_members,
    short_tar,
    storages_file,
    tarred,
    tensors_file,
    torch_tar_members,
    zipped,
)
from support.crafted import FOUR_FLOATS, Command, PersistentId, Rebuilt, archived, legacy, members_of, named, pickled
from support.tensors import materialise, torch_bytes
from support.zips import archive, entries_of

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats import compressed as compressed_files
from ckptool.formats import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")

MODEL = archived(members_of({"w": Rebuilt(named())}, _0=FOUR_FLOATS))
GB = 1 << 30


def refusal(tmp_path: Path, data: bytes) -> UnreadableCheckpoint:
    """Open what must be refused; the error is one sentence that begins with the path."""
    path = tmp_path / "model"
    path.write_bytes(data)
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(UnreadableCheckpoint) as refused:
        open_checkpoint(path)
    assert set(Path("/proc/self/fd").iterdir()) == before
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert message.count(str(path)) == 1
    assert "\n" not in message
    assert len(message) < 600
    return refused.value


# --- tar ----------------------------------------------------------------------------------------------------------


def tar_with(**fields: Any) -> bytes:
    """Write a tar archive with a good member and one whose header says what is asked for."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=fields.pop("layout", tarfile.PAX_FORMAT)) as written:
        good = tarfile.TarInfo("model.pt")
        good.size = len(MODEL)
        written.addfile(good, io.BytesIO(MODEL))
        info = tarfile.TarInfo("other")
        for name, value in fields.items():
            setattr(info, name, value)
        written.addfile(info, io.BytesIO(bytes(info.size)) if info.isreg() else None)
    return stream.getvalue()


def tar_edited(at: int, data: bytes, base: bytes | None = None) -> bytes:
    """Change bytes of the first header, and set its checksum right again."""
    whole = bytearray(base or short_tar({"model.pt": MODEL}))
    whole[at : at + len(data)] = data
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    return bytes(whole)


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    """Write a tar archive whose extended header holds these bytes."""
    inner = tar_edited(156, kind, short_tar({"header": records}))
    return inner[:1024] + short_tar({"model.pt": MODEL})


def pax_record(keyword: bytes, value: bytes) -> bytes:
    length = len(keyword) + len(value) + 3
    while len(str(length)) + len(keyword) + len(value) + 3 != length:
        length += 1
    return b"%d %s=%s\n" % (length, keyword, value)


HUGE = b"\x80" + (1 << 62).to_bytes(11, "big")
TARS: dict[str, tuple[Callable[[], bytes], str]] = {
    "checksum": (lambda: short_tar({"model.pt": MODEL}).replace(b"model.pt", b"model.pk", 1), "checksum of a header"),
    "size octal": (lambda: tar_edited(124, b"0000000008\0 "), "a number in a header is none"),
    "size negative": (lambda: tar_edited(124, b"-0000000001\0"), "a number in a header is none"),
    "size huge": (lambda: tar_edited(124, HUGE), "the tar archive is truncated"),
    "no magic": (lambda: tar_edited(257, b"ustar\0xx"), "a header of it is none"),
    "no name": (lambda: tar_edited(0, bytes(100)), "a member of it has no name"),
    "link with bytes": (lambda: tar_edited(156, b"2"), "is no file and has"),
    "device": (lambda: tar_edited(156, b"4"), "is no file and has"),
    "same name twice": (
        lambda: short_tar({"m.pt": MODEL, "./m.pt": MODEL}),
        "the tar archive holds 'm.pt' twice, and readers differ",
    ),
    "one block of zeros": (lambda: short_tar({"model.pt": MODEL})[:-512], "its end is not"),
    "no zeros": (lambda: short_tar({"model.pt": MODEL})[:-1024], "its end is not"),
    "half a block more": (lambda: short_tar({"model.pt": MODEL}) + bytes(7), "its end is not where it should be"),
    "second archive behind": (lambda: short_tar({"model.pt": MODEL}) * 2, "more bytes follow the end"),
    "pax size": (lambda: pax(pax_record(b"size", b"3")), "it gives two sizes of its member"),
    "pax size text": (lambda: pax(pax_record(b"size", b"0x3")), "gives a size that is none"),
    "pax broken": (lambda: pax(b"99 path=x\n"), "an extended header is broken"),
    "pax twice": (lambda: pax(pax_record(b"path", b"x") * 2), "says something twice"),
    "pax global path": (lambda: pax(pax_record(b"path", b"x"), b"g"), "it gives one name or size to all its members"),
    "pax long": (lambda: pax(bytes(2 << 20)), "an extended header has 2,097,152 bytes"),
    "pax at the end": (
        lambda: tar_edited(156, b"x", short_tar({"h": pax_record(b"path", b"x")})),
        "its end is not where it should be",
    ),
    "nothing inside": (lambda: short_tar({"notes.txt": b"x"}), "this tar archive holds no checkpoint"),
}


@pytest.mark.parametrize("case", TARS)
def test_hostile_tar_is_refused(tmp_path: Path, case: str) -> None:
    make, message = TARS[case]
    assert message in str(refusal(tmp_path, make()))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
@pytest.mark.parametrize("name", ["../../escape.pt", "/etc/other.pt", "model2.pt"])
def test_links_and_devices_of_a_tar_are_passed_over(tmp_path: Path, kind: bytes, name: str) -> None:
    path = tmp_path / "model"
    path.write_bytes(tar_with(name=name, type=kind, linkname="/etc/passwd"))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.facts["inside"] == "tar: model.pt"
    assert list(tmp_path.iterdir()) == [path]


def test_names_that_lead_out_of_an_archive_are_only_names(tmp_path: Path) -> None:
    path = tmp_path / "inner" / "model"
    path.parent.mkdir()
    path.write_bytes(short_tar({"../escape.pt": MODEL}))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.facts["inside"] == "tar: ../escape.pt"
    assert list(tmp_path.rglob("*.pt")) == []


def test_sparse_member_of_a_tar_is_no_file(tmp_path: Path) -> None:
    data = pax(pax_record(b"GNU.sparse.major", b"1"))
    assert "this tar archive holds no checkpoint" in str(refusal(tmp_path, data))


# --- files inside files -------------------------------------------------------------------------------------------


def encrypted_zip() -> bytes:
    entries = entries_of({"model.pt": MODEL})
    entries[0].both = {"flags": 1}
    return archive(entries)


def wrong_checksum() -> bytes:
    entries = entries_of({"model.npy": npy(numpy.ones(2)), "x": b""})
    entries[0].both = {"crc": 1}
    return archive(entries)


def index() -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {"w": "a.safetensors"}}).encode()


def zeros(nbytes: int) -> bytes:
    """Compress zeros piece by piece, so that the test itself stays small."""
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=6, mtime=0) as file:
        for _ in range(nbytes >> 20):
            file.write(bytes(1 << 20))
    return stream.getvalue()


ENVELOPES: dict[str, tuple[Callable[[], bytes], str]] = {
    "gzip of text": (lambda: gzip.compress(b"Entry not found"), "this is text that begins 'Entry not found'"),
    "gzip of nothing": (lambda: gzip.compress(b""), "the file is empty"),
    "gzip cut": (lambda: gzip.compress(MODEL)[:-3], "compressed with gzip and cut short"),
    "gzip damaged": (lambda: gzip.compress(MODEL).replace(MODEL[40:44], b"\0\0\0\0")[:-8] + bytes(8), "and damaged"),
    "gzip and more": (lambda: gzip.compress(MODEL) + b"more", "compressed with gzip and damaged"),
    "bzip2 cut": (lambda: bz2.compress(MODEL)[:-3], "compressed with bzip2 and cut short"),
    "xz cut": (lambda: lzma.compress(MODEL)[:-3], "compressed with xz and cut short"),
    "bomb": (lambda: zeros(80 << 20), "expands too far"),
    "three deep": (
        lambda: gzip.compress(gzip.compress(gzip.compress(MODEL))),
        "more than 2 archives lie in one another",
    ),
    "endless": (lambda: gzip.compress(zipped({"a.tar": short_tar({"m.pt": MODEL})})), "more than 2 archives"),
    "several": (lambda: short_tar({"a.pt": MODEL, "b.pt": MODEL}), "2 files that may be meant, 'a.pt', 'b.pt'"),
    "many": (lambda: zipped({f"{n}.pt": MODEL for n in range(20)}), "'7.pt' and 12 more; name one of them"),
    "encrypted": (encrypted_zip, "is marked as encrypted"),
    "wrong checksum": (wrong_checksum, "match"),
    "index inside": (lambda: gzip.compress(index()), "this is the index of a checkpoint in shards"),
    "damaged inside": (lambda: short_tar({"m.pt": MODEL[:-5]}), "'m.pt' in it: this is a truncated zip archive"),
    "two formats": (lambda: short_tar({"m.pt": MODEL}) + MODEL, "the file is two formats at once (tar and zip)"),
    "escapes": (lambda: short_tar({"\x1b[2Jm.pt": MODEL, "b.pt": MODEL}), r"'\x1b[2Jm.pt', 'b.pt'"),
    "nested escapes": (lambda: short_tar({"\x1b[2J\nm.pt": MODEL[:-5]}), r"'\x1b[2J\nm.pt' in it: "),
}


@pytest.mark.parametrize("case", ENVELOPES)
def test_hostile_envelope_is_refused(tmp_path: Path, case: str) -> None:
    make, message = ENVELOPES[case]
    assert message in str(refusal(tmp_path, make()))


def test_bomb_costs_neither_memory_nor_disk(tmp_path: Path) -> None:
    data = zeros(80 << 20)
    before = os.statvfs(tempfile.gettempdir()).f_bavail
    tracemalloc.start()
    refusal(tmp_path, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20
    assert (before - os.statvfs(tempfile.gettempdir()).f_bavail) * os.statvfs(tempfile.gettempdir()).f_frsize < 64 << 20


def test_no_room_to_unpack_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compressed_files.os, "write", refuse)
    error = refusal(tmp_path, gzip.compress(MODEL))
    assert "cannot be unpacked to" in str(error)
    assert "(No space left on device); set TMPDIR to a folder with room" in str(error)


# --- NumPy --------------------------------------------------------------------------------------------------------


def header(descr: str = "<f4", shape: str = "(2,)", order: str = "False", rest: str = "}") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, {rest}   \n"


TWO = struct.pack("<2f", 1, 2)
ARRAYS: dict[str, tuple[Callable[[], bytes], str]] = {
    "bytes missing": (lambda: npy_with(header(), TWO[:-1]), "has 7 bytes, and its shape asks for 8"),
    "bytes left": (lambda: npy_with(header(), TWO * 2), "has 16 bytes, and its shape asks for 8"),
    "huge": (lambda: npy_with(header(shape="(4611686018427387904, 4)"), TWO), "its shape asks for"),
    "too many digits": (lambda: npy_with(header(shape="(" + "9" * 30 + ",)"), TWO), "does not write"),
    "negative": (lambda: npy_with(header(shape="(-2,)"), TWO), "does not write"),
    "dimensions": (lambda: npy_with(header(shape="(" + "1, " * 70 + "2)"), TWO), "has a shape that no array can have"),
    "code": (lambda: npy_with("__import__('os').system('true')  \n", TWO), "does not write"),
    "code in the shape": (lambda: npy_with(header(shape="(exit(),)"), TWO), "does not write"),
    "records": (lambda: npy(numpy.zeros(2, [("a", "f4"), ("b", "i4")])), "holds records"),
    "text": (lambda: npy(numpy.array(["ab"])), "holds elements of the type '<U2', which no tensor has"),
    "long double": (lambda: npy(numpy.zeros(2, "g")), "which no tensor has"),
    "dates": (lambda: npy(numpy.zeros(2, "M8[s]")), "which no tensor has"),
    "native order": (lambda: npy_with(header(descr="=f4"), TWO), "which no tensor has"),
    "version": (lambda: npy_with(header(), TWO, b"\x04\0"), "does not begin as an array of NumPy does"),
    "header length": (lambda: b"\x93NUMPY\x02\0\xff\xff\xff\xff{}", "has a header that ends at byte"),
    "only magic": (lambda: b"\x93NUMPY", "does not begin as an array"),
    "two in one": (lambda: npy(numpy.ones(2)) * 2, "its shape asks for"),
    "in an archive": (lambda: zipped({"a.npy": npy(numpy.ones(2))[:-1]}), "'a.npy' has 15 bytes"),
    "not in an archive": (lambda: zipped({"a.npy": b"x"}), "'a.npy' does not begin as an array of NumPy does"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_hostile_array_is_refused(tmp_path: Path, case: str) -> None:
    make, message = ARRAYS[case]
    assert message in str(refusal(tmp_path, make()))


@pytest.mark.parametrize("make", [lambda array: npy(array, allow_pickle=True), lambda array: npz({"x": array})])
def test_array_of_objects_is_data(run: Any, tmp_path: Path, make: Callable[[Any], bytes]) -> None:
    path = tmp_path / "model"
    array = numpy.empty(1, object)
    array[0] = Command()
    path.write_bytes(make(array))
    with open_checkpoint(path) as checkpoint:
        assert "posix.system" in [use.ref.full_name for use in checkpoint.globals if use.ref.severity == "dangerous"]
    assert run("verify", path).status == 1


# --- pickles ------------------------------------------------------------------------------------------------------


class Loaded:
    """Pickle as a storage that lies in the pickle as a file of its own."""

    def __init__(self, stream: bytes) -> None:
        self.stream = stream

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.storage._load_from_bytes, (self.stream,)


def with_storage(**changes: Any) -> bytes:
    """Pickle a tensor whose storage is such a file."""
    numel = changes.pop("numel", 4)
    name = PersistentId(named("0", numel, torch.FloatStorage, "cpu", changes.pop("view", None)))
    stream = legacy(changes.pop("value", name), ["0"], [(changes.pop("count", 4), FOUR_FLOATS)], **changes)
    arguments = (Loaded(stream), 0, (4,), (1,), False, collections.OrderedDict())
    return pickle.dumps({"w": Tensor(arguments)}, 2)


@dataclass
class Tensor:
    """Pickle as a tensor rebuilt from these arguments."""

    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


PICKLES: dict[str, tuple[Callable[[], bytes], str]] = {
    "cut": (lambda: pickle.dumps({"w": numpy.ones(3)})[:-9], "the pickle ends early"),
    "two": (lambda: pickle.dumps({}) * 2, "bytes follow the pickle, which most readers pass over"),
    "storage": (lambda: pickled({"w": Rebuilt(named())}), "refers to storages, which only a torch container has"),
    "array bytes": (
        lambda: pickle.dumps(numpy.ones(3), 2).replace(b"K\x03\x85", b"K\x04\x85"),
        "holds a NumPy array whose bytes do not fill its shape",
    ),
    "array type": (lambda: pickle.dumps(numpy.ones(3), 2).replace(b"f8", b"f7"), "a type that there is not"),
    "type version": (lambda: pickle.dumps(numpy.ones(3), 2).replace(b"(K\x03", b"(K\x05"), "NumPy does not write"),
    "storage size": (lambda: with_storage(numel=5), "a storage in the pickle has another size than it declares"),
    "storage count": (lambda: with_storage(count=3), "a storage in the pickle has another size than it declares"),
    "storage tail": (lambda: with_storage(tail=b"x"), "a storage in the pickle has another size than it declares"),
    "storage view": (lambda: with_storage(view=("v", 0, 4)), "a storage in the pickle does not hold one storage"),
    "storage is none": (lambda: with_storage(value=3), "a storage in the pickle does not hold one storage"),
    "storage magic": (lambda: with_storage(magic=3), "the preamble is not that of torch's format 1001"),
    "storage system": (lambda: with_storage(system={"x": Command()}), "names code, which torch never writes there"),
    "array version": (lambda: pickle.dumps(numpy.ones(3), 2).replace(b"(K\x01", b"(K\x02"), "NumPy does not write"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_hostile_pickle_is_refused(tmp_path: Path, case: str) -> None:
    make, message = PICKLES[case]
    assert message in str(refusal(tmp_path, make()))


def test_crafted_storage_in_a_pickle_is_what_torch_reads(tmp_path: Path) -> None:
    """Judge the file that the hostile rows start from."""
    path = tmp_path / "model"
    path.write_bytes(with_storage())
    assert pickle.loads(with_storage())["w"].tolist() == [1, 2, 3, 4]
    with open_checkpoint(path) as checkpoint:
        assert materialise(checkpoint.root.get("w")).tolist() == [1, 2, 3, 4]


def test_one_storage_loaded_without_end_is_refused(tmp_path: Path) -> None:
    one = pickle.dumps(Loaded(b"x" * 5000), 2)[2:-1]
    loads = b"ctorch.storage\n_load_from_bytes\n" + b"h\x00\x85R0"
    data = b"\x80\x02B" + struct.pack("<I", 5000) + bytes(5000) + b"q\x000" + loads * 400 + one + b"."
    refusal(tmp_path, data)


def test_what_a_pickle_names_outlives_what_follows_it(tmp_path: Path) -> None:
    error = refusal(tmp_path, pickle.dumps({}) + pickle.dumps(Command()))
    assert [use.ref.full_name for use in error.globals if use.ref.severity == "dangerous"] == ["posix.system"]


# --- TorchScript --------------------------------------------------------------------------------------------------


def script(code: bytes = CODE, **fields: Any) -> bytes:
    return zipped(script_members(code, **fields))


def script_with(**members: bytes) -> bytes:
    return zipped(script_members() | {f"m/{name}": data for name, data in members.items()})


SCRIPTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "no class": (lambda: script(b"class N(Module):\n  __parameters__ = []\n"), "lacks the class '__torch__.M'"),
    "no module": (lambda: script(b"class M:\n  w : Tensor\n"), "lacks the class '__torch__.M' of its module"),
    "class twice": (lambda: script(CODE * 2), "declares the class 'M' twice"),
    "class in a text": (lambda: script(b'X = """\n' + CODE + b'"""\n'), "holds a text of several lines"),
    "names escaped": (lambda: script(CODE.replace(b'"w"', b'"\\x77"')), "in another way than torch does"),
    "names computed": (lambda: script(CODE.replace(b'["w", ]', b"list(x)")), "in another way than torch does"),
    "no UTF-8": (lambda: script(b"\xff" + CODE), "is not UTF-8"),
    "big-endian": (lambda: script_with(byteorder=b"big"), "of a big-endian machine"),
    "storage missing": (lambda: script(w=Rebuilt(named("7"))), "the storage '7' has no record"),
    "storage size": (lambda: script(w=Rebuilt(named("0", 9), (9,))), "declares 36 bytes and has 16"),
    "beyond storage": (lambda: script(w=Rebuilt(named(), (5,))), "reaches beyond its storage"),
    "root is no module": (
        lambda: zipped(script_members() | {"m/data.pkl": pickled({"w": 1})}),
        "lacks the class 'DictNode' of its module",
    ),
    "constants damaged": (
        lambda: zipped(script_members() | {"m/constants.pkl": b"\x80\x02"}),
        "constants.pkl: the pickle ends early",
    ),
    "two folders": (lambda: zipped(script_members() | {"n/x": b""}), "the archive has more than one folder"),
}


@pytest.mark.parametrize("case", SCRIPTS)
def test_hostile_script_is_refused(tmp_path: Path, case: str) -> None:
    make, message = SCRIPTS[case]
    assert message in str(refusal(tmp_path, make()))


def test_modules_without_end_are_refused(tmp_path: Path) -> None:
    """Let a module hold itself, which a walk would never leave."""
    body = b"\x80\x02c__torch__\nM\n)\x81q\x01}X\x01\x00\x00\x00ah\x01sb."
    error = refusal(tmp_path, zipped(script_members() | {"m/data.pkl": body}))
    assert "nest without end" in str(error)


def test_program_names_what_its_pickle_would_run(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(script(w=Rebuilt(named()), x=Command()))
    assert run("verify", path).status == 1
    assert json.loads(run("inspect", path, "--json").out)["safety"]["verdict"] == "dangerous"


def test_what_a_program_should_not_hold_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(script_with(**{"payload.pkl": b"x", "run.sh": b"x"}))
    with open_checkpoint(path) as checkpoint:
        codes = {finding.code for finding in checkpoint.findings}
    assert {"program", "extra-pickle", "extra-code"} <= codes


OLD_SCRIPTS: dict[str, tuple[dict[str, Any], str]] = {
    "no module": ({"mainModule": None}, "its table lacks a part"),
    "tensor id": (
        {"mainModule": {"parameters": [{"name": "w", "tensorId": "9"}]}},
        "the tensor 'w' is named twice, or is none",
    ),
    "named twice": ({"mainModule": {"parameters": [{"name": "w"}, {"name": "w"}]}}, "is named twice"),
    "tensors": ({"tensors": {}}, "has 'tensors' of another type"),
    "type": ({"tensors": [{"dataType": "STRING"}]}, "of the unknown type 'STRING'"),
    "record": ({"tensors": [{"dataType": "FLOAT", "data": {"key": "../0"}}]}, "the record '../0' is missing"),
    "beyond": (
        {"tensors": [{"dataType": "FLOAT", "data": {"key": "tensors/0"}, "dims": ["5"], "strides": ["1"]}]},
        "'tensor 0' rebuilds a tensor that reaches beyond its storage",
    ),
    "float": (
        {"tensors": [{"dataType": "FLOAT", "data": {"key": "tensors/0"}, "dims": [1.0], "strides": ["1"]}]},
        "its table holds a number that is none",
    ),
}


@pytest.mark.parametrize("case", OLD_SCRIPTS)
def test_hostile_script_of_torch_1_0_is_refused(tmp_path: Path, case: str) -> None:
    changes, message = OLD_SCRIPTS[case]
    assert message in str(refusal(tmp_path, zipped(old_script_members(**changes))))


@pytest.mark.parametrize("text", [b"[" * 200_000, b'{"a": 1, "a": 2}', b"{", b"\xff", b"9" * 5000])
def test_hostile_json_is_refused(tmp_path: Path, text: bytes) -> None:
    assert "its table" in str(refusal(tmp_path, zipped(old_script_members() | {"m/model.json": text})))
    members = exported_members() | {"m/data/weights/model_weights_config.json": text}
    assert "the table" in str(refusal(tmp_path, zipped(members)))


# --- torch.export -------------------------------------------------------------------------------------------------


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": exported_entry(**changes)}


def sizes(*numbers: Any) -> list[dict[str, Any]]:
    return [{"as_int": number} for number in numbers]


EXPORTS: dict[str, tuple[dict[str, Any], str]] = {
    "beyond": (entry(tensor_meta={"sizes": sizes(3, 2)}), "reaches beyond its storage"),
    "offset": (entry(tensor_meta={"storage_offset": {"as_int": 1}}), "reaches beyond its storage"),
    "negative": (entry(tensor_meta={"strides": sizes(-2, 1)}), "an impossible size or stride"),
    "bool": (entry(tensor_meta={"sizes": sizes(True, 2)}), "has sizes that are no numbers"),
    "symbol": (entry(tensor_meta={"sizes": [{"as_expr": {}}, {"as_int": 2}]}), "has sizes that are no numbers"),
    "dtype": (entry(tensor_meta={"dtype": 99}), "has the unknown element type 99"),
    "layout": (entry(tensor_meta={"layout": 1}), "has the layout 1, which is not dense"),
    "record": (entry(path_name="weight_9"), "has no record 'data/weights/weight_9'"),
    "path": (entry(path_name="../constants/x"), "described in a way that torch does not write"),
    "pickle flag": (entry(use_pickle=1), "described in a way that torch does not write"),
    "not saved": (entry(use_pickle=True), "is no file of torch.save"),
    "two types": (
        {"w": exported_entry(), "v": exported_entry(tensor_meta={"dtype": 4})},
        "shares its bytes with a tensor of float32",
    ),
    "entry": ({"w": 3}, "described in a way that torch does not write"),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_hostile_export_is_refused(tmp_path: Path, case: str) -> None:
    entries, message = EXPORTS[case]
    assert message in str(refusal(tmp_path, zipped(exported_members(**entries))))


def test_export_without_weights_is_refused(tmp_path: Path) -> None:
    members = {name: data for name, data in exported_members().items() if "models/" not in name}
    assert "holds compiled programs, and no weights" in str(refusal(tmp_path, zipped(members)))


def test_pickled_tensor_of_an_export_is_read_as_data(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    members = exported_members(w=exported_entry(use_pickle=True, path_name="weight_1"))
    path.write_bytes(zipped(members | {"m/data/weights/weight_1": torch_bytes(torch.arange(3.0))}))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.root.get("state_dict").get("w").shape == (3,)
    path.write_bytes(zipped(members | {"m/data/weights/weight_1": pickle.dumps(Command())}))
    assert run("verify", path).status == 1


# --- torch before 0.1.10 ------------------------------------------------------------------------------------------

OLD_TARS: dict[str, tuple[dict[str, bytes], str]] = {
    "numel": ({"storages": storages_file(numel=1 << 40)}, "ends at byte"),
    "numel negative": ({"storages": storages_file(numel=-1)}, "ends at byte"),
    "count": ({"storages": storages_file(count=1 << 40)}, "does not say how much it holds"),
    "count text": ({"storages": storages_file(count="1")}, "does not say how much it holds"),
    "tail": ({"storages": storages_file(tail=b"x")}, "1 bytes follow the last of 'storages'"),
    "view beyond": ({"storages": storages_file(views=[(12, 11, 3, 2)])}, "a view of a storage reaches beyond it"),
    "view of nothing": ({"storages": storages_file(views=[(12, 13, 0, 1)])}, "is not what torch writes"),
    "view again": ({"storages": storages_file(views=[(11, 11, 0, 1)])}, "is no number, or stands for two"),
    "sizes": ({"tensors": tensors_file(sizes=(3, 2))}, "reaches beyond its storage"),
    "dimensions": ({"tensors": tensors_file(sizes=(1,) * 70, strides=(1,) * 70)}, "a tensor has 70 dimensions"),
    "storage": ({"tensors": tensors_file(key=99)}, "a tensor has no storage"),
    "big-endian": ({"sys_info": pickled({"little_endian": False})}, "written on a big-endian machine"),
    "reference": (
        {"pickle": pickled({"w": 1}).replace(b"K\x01", b"X\x01\x00\x00\x009Q")},
        "is no tensor and no storage",
    ),
}


@pytest.mark.parametrize("case", OLD_TARS)
def test_hostile_checkpoint_of_torch_0_1_is_refused(tmp_path: Path, case: str) -> None:
    changes, message = OLD_TARS[case]
    assert message in str(refusal(tmp_path, tarred(torch_tar_members(**changes))))


def test_checkpoint_of_torch_0_1_lacks_a_file(tmp_path: Path) -> None:
    members = {name: data for name, data in torch_tar_members().items() if name != "tensors"}
    assert "it lacks tensors" in str(refusal(tmp_path, tarred(members)))


def test_codes_of_torch_0_1_are_told(tmp_path: Path) -> None:
    members = torch_tar_members(pickle=pickled({"x": Command()}))
    path = tmp_path / "model"
    path.write_bytes(tarred(members))
    with open_checkpoint(path) as checkpoint:
        assert [use.ref.full_name for use in checkpoint.globals if use.ref.severity == "dangerous"] == ["posix.system"]


def test_zip_of_zip_is_not_verified_twice(tmp_path: Path) -> None:
    """Read a wrong checksum inside: the archive's own, told when the tensor is read."""
    entries = entries_of(members_of({"w": Rebuilt(named())}, _0=FOUR_FLOATS))
    for one in entries:
        if one.name.endswith("data/0"):
            one.both = {"crc": 1}
    path = tmp_path / "model"
    path.write_bytes(zipped({"m.pt": archive(entries)}, zipfile.ZIP_STORED))
    with open_checkpoint(path) as checkpoint, pytest.raises(UnreadableCheckpoint, match="do not match their stored"):
        list(checkpoint.root.get("w").storage.source.stream())
