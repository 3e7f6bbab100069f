"""Containers that lie are refused in one sentence; what is only odd is told. Nothing is allocated on their word."""

from __future__ import annotations

import io
import json
import pickle
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.crafted import (
    FOUR_FLOATS,
    MAGIC,
    SYSTEM,
    Rebuilt,
    archived,
    legacy,
    members_of,
    named,
    pickled,
    safetensors_file,
)
from support.tensors import materialise, tensors_of, torch_bytes
from support.zips import Entry, archive, deflated, entries_of

from ckptool.errors import ChecksumMismatch, UnreadableCheckpoint
from ckptool.formats import open_checkpoint
from ckptool.model.values import TensorSpec

pytestmark = pytest.mark.filterwarnings("ignore")

GOOD = members_of({"w": Rebuilt(named())}, _0=FOUR_FLOATS)
BIG = 0xFFFFFFFF


class Call:
    """Pickle as the call of something dangerous."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("true",)


def zipfile_bytes(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as written:
        for name, data in members.items():
            written.writestr(name, data)
    return stream.getvalue()


def refusal(tmp_path: Path, data: bytes) -> UnreadableCheckpoint:
    """Open what must be refused; the error is one sentence that begins with the path."""
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    with pytest.raises(UnreadableCheckpoint) as refused:
        open_checkpoint(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert str(refused.value).count(str(path)) == 1
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
    return refused.value


def codes(tmp_path: Path, data: bytes) -> list[str]:
    """Open what is read all the same; give the codes of its findings."""
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    with open_checkpoint(path) as checkpoint:
        assert materialise(tensors_of(checkpoint)["w"]).tolist() == [1, 2, 3, 4]
        return [finding.code for finding in checkpoint.findings]


def edited(name: str, **changes: Any) -> list[Entry]:
    """Give the entries of a good archive, one of them changed."""
    entries = entries_of(GOOD)
    for entry in entries:
        if entry.name == f"archive/{name}":
            for field, value in changes.items():
                setattr(entry, field, value)
    return entries


def good(*more: Entry) -> list[Entry]:
    return [*entries_of(GOOD), *more]


def doubled(count: int) -> bytes:
    pickles = [Entry("archive/data.pkl", pickled({"w": index})) for index in range(count)]
    return archive([*pickles, *entries_of(GOOD)[1:]])


def overlapping() -> bytes:
    entries = entries_of(GOOD)
    return archive([*entries, Entry("archive/data/1", FOUR_FLOATS, central={"header": 0})])


def quoted_overlap() -> bytes:
    """Let one record's payload contain the whole of the next."""
    inner = archive([Entry("archive/data/1", b"inner")])[: 30 + 14 + 5]
    entries = good(Entry("archive/data/2", inner))
    data = archive(entries)
    at = data.index(inner)
    return archive([*entries, Entry("archive/data/1", b"inner", central={"header": at})])


def extra(kind: int, data: bytes) -> bytes:
    return struct.pack("<2H", kind, len(data)) + data


def unicode_path(raw: bytes, name: bytes) -> bytes:
    return extra(0x7075, b"\x01" + struct.pack("<I", zlib.crc32(raw)) + name)


def encrypted(bit: int, place: str) -> bytes:
    return archive(edited("data.pkl", **{place: {"flags": 1 << bit}}))


def data_descriptor(**changes: int) -> bytes:
    numbers = {"crc": zlib.crc32(FOUR_FLOATS), "stored": 16, "size": 16} | changes
    descriptor = b"PK\x07\x08" + struct.pack("<3I", *numbers.values())
    return archive(edited("data/0", both={"flags": 8}, local={"crc": 0, "stored": 0, "size": 0}, descriptor=descriptor))


def wide_header(size: int, stored: int, *more: int) -> bytes:
    """Move the sizes of data/0 into a 64-bit field."""
    field = extra(1, struct.pack(f"<{2 + len(more)}Q", size, stored, *more))
    return archive(edited("data/0", central={"size": BIG, "stored": BIG}, central_extra=field))


DAMAGED = "the zip archive is damaged or was tampered with: "
AMBIGUOUS = "the zip archive is ambiguous: it holds the record 'archive/"
PLAIN = "is not a plain path; write the checkpoint anew with torch.save"
OTHER_HEADER = "has another header than the directory says"
OTHER_NUMBERS = "has another size or checksum than the directory says"

ZIPS: dict[str, tuple[Callable[[], bytes], str]] = {
    **{f"C1 {count} pickles": ((lambda count=count: doubled(count)), AMBIGUOUS) for count in (2, 3, 7)},
    "C1 one-letter twins": (lambda: archive([Entry("a"), Entry("a")]), "it holds the record 'a' twice"),
    "C2 case twins": (lambda: archive(good(Entry("archive/DATA.PKL", b"."))), "and torch ignores case"),
    "C3 two archives": (lambda: archive(good()) * 2, "its directory is not where its end record says"),
    "C3 shifted": (
        lambda: archive(good(), before=archive(good())),
        "bytes stand before the zip archive, or it is two in one",
    ),
    "C4 local name": (lambda: archive(edited("data.pkl", local_name="archive/data.pkX")), OTHER_HEADER),
    "C4 shorter local name": (lambda: archive(edited("data.pkl", local_name="archive/d")), OTHER_HEADER),
    **{f"C5 bit {bit}": ((lambda bit=bit: encrypted(bit, "both")), "is marked as encrypted") for bit in (0, 6, 13)},
    "C5 bit 5": (lambda: encrypted(5, "both"), "has flags that no writer of checkpoints sets"),
    "C5 only local": (lambda: encrypted(0, "local"), OTHER_HEADER),
    "C5 only central": (lambda: encrypted(0, "central"), "is marked as encrypted"),
    "C7 bomb by declaration": (
        lambda: archive(good(deflated("archive/data/1", b"x" * 100, size=3 << 30))),
        "the zip archive would expand from",
    ),
    "C7 pickle bomb": (
        lambda: archive([deflated("archive/data.pkl", bytes(60 << 20)), *good()[1:]]),
        "declares 62,914,560 bytes, more than are read",
    ),
    "C7 damaged pickle": (
        lambda: archive([deflated("archive/data.pkl", b"x" * 99, crc=0, size=98), *good()[1:]]),
        "it expands beyond the size it declares",
    ),
    "C7 damaged version": (
        lambda: archive([*good()[:-1], deflated("archive/version", b"3\n", size=3)]),
        "do not give the size it declares",
    ),
    "C6 checksum of the version": (
        lambda: archive(edited("version", both={"crc": 1})),
        "archive/version: its bytes do not match their stored checksum",
    ),
    "C9 overlap": (overlapping, "two records overlap"),
    "C9 quoted overlap": (quoted_overlap, "two records overlap"),
    "C10 header beyond": (
        lambda: archive(edited("version", central={"header": 1 << 30}, local={"signature": 1})),
        "the record 'archive/version' begins outside the archive",
    ),
    "C10 header elsewhere": (
        lambda: archive(edited("version", central={"header": 1 << 30})),
        "it holds a record that its directory does not list",
    ),
    "C10 size beyond": (
        lambda: archive(edited("version", both={"size": 10_000, "stored": 10_000})),
        "reaches into the directory",
    ),
    "C10 size into next": (lambda: archive(edited("data/0", both={"size": 40, "stored": 40})), "two records overlap"),
    "C11 no field": (
        lambda: archive(edited("data/0", central={"size": BIG, "stored": BIG})),
        "has a 64-bit field of 0 bytes, not 16",
    ),
    "C11 short field": (
        lambda: archive(edited("data/0", central={"size": BIG, "stored": BIG}, central_extra=extra(1, bytes(8)))),
        "has a 64-bit field of 8 bytes, not 16",
    ),
    "C11 long field": (lambda: wide_header(16, 16, 0), "has a 64-bit field of 24 bytes, not 16"),
    "C11 needless field": (
        lambda: archive(edited("data/0", central_extra=extra(1, bytes(16)))),
        "has a 64-bit field of 16 bytes, not 0",
    ),
    "C11 two fields": (
        lambda: archive(
            edited(
                "data/0",
                central={"size": BIG, "stored": BIG},
                central_extra=extra(1, struct.pack("<2Q", 16, 16)) + extra(1, struct.pack("<2Q", 8, 8)),
            )
        ),
        "has damaged extra fields",
    ),
    "C11 cut field": (
        lambda: archive(edited("data/0", central_extra=b"\x01\x00\x40\x00abc")),
        "has damaged extra fields",
    ),
    "C11 other sizes": (lambda: wide_header(1 << 40, 1 << 40), OTHER_NUMBERS),
    "C11 local field": (
        lambda: archive(
            edited("data/0", local={"size": BIG, "stored": BIG}, local_extra=extra(1, struct.pack("<2Q", 16, 8)))
        ),
        OTHER_NUMBERS,
    ),
    "C11 no local field": (
        lambda: archive(edited("data/0", local={"size": BIG, "stored": BIG})),
        "has a local 64-bit field of 0 bytes",
    ),
    "C11 end disagrees": (lambda: archive(good(), end64={}, end={"offset": 7}), "its two end records disagree"),
    "C11 end64 count": (lambda: archive(good(), end64={"here": 2, "total": 2}), "its two end records disagree"),
    "C11 end64 signature": (lambda: archive(good(), end64={"signature": 1}), "its 64-bit end record is damaged"),
    "C11 end64 size": (lambda: archive(good(), end64={"record_size": 45}), "its 64-bit end record is damaged"),
    "C11 locator beyond": (
        lambda: archive(good(), end64={}, locator={"offset": 1 << 60}),
        "its 64-bit end record is misplaced",
    ),
    "C11 locator elsewhere": (
        lambda: archive(good(), end64={}, locator={"offset": 0}),
        "its 64-bit end record is damaged",
    ),
    "C12 descriptor crc": (lambda: data_descriptor(crc=1), "has another descriptor than the directory says"),
    "C12 descriptor size": (lambda: data_descriptor(size=17), "has another descriptor than the directory says"),
    "C12 no descriptor": (
        lambda: archive(edited("data/0", both={"flags": 8})),
        "has another descriptor than the directory says",
    ),
    "C12 local crc": (lambda: archive(edited("data/0", local={"crc": 5})), OTHER_NUMBERS),
    "C12 zeros without descriptor": (
        lambda: archive(edited("data/0", local={"crc": 0, "stored": 0, "size": 0})),
        OTHER_NUMBERS,
    ),
    "C13 extra beyond": (lambda: archive(edited("version", local={"extra_size": 65_535})), OTHER_HEADER),
    **{
        f"C14 {name!r}": ((lambda name=name: archive(good(Entry(name)))), PLAIN)
        for name in (
            *("/etc/passwd", "../evil", "archive/../evil", "archive/./x", "archive/..", "archive\\evil", "C:/evil"),
            *("archive/data.pkl\0.txt", "", "archive//x", "\0"),
        )
    },
    "C14 marked as a folder": (
        lambda: archive(edited("data/0", central={"attributes": 0x10})),
        "the record 'archive/data/0' is marked as a folder",
    ),
    "C15 two roots": (
        lambda: archive(good(Entry("other/data/1", b"x"))),
        "the archive has more than one folder: 'archive' and 'other'",
    ),
    "C15 no folder": (
        lambda: archive(good(Entry("loose", b"x"))),
        "the archive has more than one folder: 'archive' and 'loose'",
    ),
    "C16 version word": (lambda: archived(GOOD | {"archive/version": b"abc"}), "says b'abc', which torch never writes"),
    "C16 alignment word": (
        lambda: archived(GOOD | {"archive/.storage_alignment": b"64*"}),
        "says b'64*', which torch never writes",
    ),
    "C16 serialization number of no text": (
        lambda: archived(GOOD | {"archive/.data/serialization_id": b"\x88" * 40}),
        "which torch never writes",
    ),
    "C16 version huge": (lambda: archived(GOOD | {"archive/version": b"9" * 20}), "which torch never writes"),
    "C16 version long": (lambda: archived(GOOD | {"archive/version": b"3" * 1000}), "is too long to be what it says"),
    "C17 byteorder": (lambda: archived(GOOD | {"archive/byteorder": b"middle"}), "says b'middle', which torch never"),
    "C17 byteorder newline": (lambda: archived(GOOD | {"archive/byteorder": b"little\n"}), "which torch never writes"),
    "C19 missing record": (
        lambda: archived({name: data for name, data in GOOD.items() if name != "archive/data/0"}),
        "the storage '0' has no record in the archive",
    ),
    "C20 ten bytes": (lambda: archive(good()) + b"0123456789", "10 bytes follow the end of the zip archive"),
    "C20 many bytes": (lambda: archive(good()) + bytes(70_000), "is a truncated zip archive"),
    "C20 end in comment": (
        lambda: archive(good(), comment=archive([])),
        "the zip archive has two ends, and readers differ on which one counts",
    ),
    "C20 signature in comment": (lambda: archive(good(), comment=b"PK\x05\x06..."), "the zip archive has two ends"),
    "C20 comment too long": (lambda: archive(good(), end={"comment_size": 9}), "is a truncated zip archive"),
    "C21 junk before": (
        lambda: archive(good(), before=b"#!/bin/sh\n"),
        "10 bytes stand before the zip archive, or it is two in one",
    ),
    "C21 junk, offsets from the archive": (
        lambda: b"\x01junk" + archive(good()),
        "its directory is not where its end record says",
    ),
    "C22 hidden record": (
        lambda: archive(good(), gap=archive([Entry("archive/data.pkl", b".")])[:46]),
        "it holds a record that its directory does not list",
    ),
    "C22 hidden record between": (
        lambda: archive(edited("version", before=archive([Entry("archive/data.pkl", b".")])[:47])),
        "it holds a record that its directory does not list",
    ),
    **{
        f"C23 {kind}": (
            (lambda method=method: archive(edited("data/0", both={"method": method}))),
            f"the record 'archive/data/0' is compressed with {kind}; write the checkpoint anew with torch.save",
        )
        for method, kind in ((12, "bzip2"), (14, "lzma"), (93, "zstd"), (9, "deflate64"), (200, "method 200"))
    },
    "C23 parts": (lambda: archive(good(), end={"disk": 1}), "this is one part of a zip archive in several parts"),
    "C23 part of a record": (lambda: archive(edited("data/0", central={"disk": 1})), "has flags that no writer"),
    "C24 declared entries": (lambda: archive(good(), end={"here": 9, "total": 9}), "its directory is shorter than it"),
    "C24 too many": (
        lambda: archive(good(), end={"here": 0xFFFF, "total": 0xFFFF}, end64={"here": 2**40, "total": 2**40}),
        "declares 1,099,511,627,776 records, more than the 1,000,000 that are read",
    ),
    "C24 too few": (lambda: archive(good(), end={"here": 2, "total": 2}), "its directory is longer than it declares"),
    "C25 not UTF-8": (
        lambda: archive(good(Entry(b"archive/\xff\xfe", both={"flags": 1 << 11}))),
        "is no UTF-8",
    ),
    "C25 second name": (
        lambda: archive(edited("data/0", central_extra=unicode_path(b"archive/data/0", b"archive/data/1"))),
        "has a second, different name",
    ),
    "stored in two sizes": (
        lambda: archive(edited("data/0", both={"size": 15})),
        "is stored as it is, but in another size than its own",
    ),
    "damaged entry": (lambda: archive(edited("data/0", central={"signature": 1})), "its directory has a damaged entry"),
    "damaged local signature": (lambda: archive(edited("data/0", local={"signature": 1})), OTHER_HEADER),
}


@pytest.mark.parametrize("case", ZIPS)
def test_hostile_zip_is_refused(tmp_path: Path, case: str) -> None:
    make, message = ZIPS[case]
    assert message in str(refusal(tmp_path, make()))


ODD_ZIPS: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "as it is": (lambda: archive(good()), []),
    "C5 how hard it was compressed": (lambda: archive(edited("data/0", both={"flags": 6})), []),
    "C11 wide sizes": (lambda: wide_header(16, 16), []),
    "C11 wide end": (lambda: archive(good(), end64={}), []),
    "C11 only the wide end": (
        lambda: archive(good(), end64={}, end={"here": 0xFFFF, "total": 0xFFFF, "size": BIG, "offset": BIG}),
        [],
    ),
    "C12 descriptor": (data_descriptor, []),
    **{
        f"C13 padding {size}": ((lambda size=size: archive(edited("data/0", local_extra=bytes(size)))), [])
        for size in (1, 63, 64, 65_535)
    },
    "C14 symbolic link": (
        lambda: archive(edited("data/0", central={"made_by": 3 << 8, "attributes": 0o120777 << 16})),
        ["symlink-record"],
    ),
    "C15 odd root": (
        lambda: archive([Entry(str(entry.name).replace("archive", "\x1b[2J"), entry.data) for entry in good()]),
        [],
    ),
    "C16 no version": (
        lambda: archived({name: data for name, data in GOOD.items() if "version" not in name}),
        ["no-version"],
    ),
    "C18 extra pickle": (lambda: archive(good(Entry("archive/payload.pkl", b"."))), ["extra-pickle"]),
    "C18 extra code": (lambda: archive(good(Entry("archive/code/run.py", b"1"))), ["extra-code"]),
    "C18 unreferenced": (lambda: archive(good(Entry("archive/data/9", b"x"))), ["unreferenced-storage"]),
    "C20 comment": (lambda: archive(good(), comment=b"made by hand"), []),
    "C22 gap": (lambda: archive(edited("version", before=bytes(1024))), ["unlisted-bytes"]),
    "C22 gap at the end": (lambda: archive(good(), gap=b"hello"), ["unlisted-bytes"]),
    "C25 code page 437": (lambda: archive(good(Entry(b"archive/\x81.txt", b"x"))), ["extra-member"]),
}


@pytest.mark.parametrize("case", ODD_ZIPS)
def test_odd_zip_is_read_and_told(tmp_path: Path, case: str) -> None:
    make, expected = ODD_ZIPS[case]
    data = make()
    assert codes(tmp_path, data) == expected
    with zipfile.ZipFile(io.BytesIO(data)) as peer:  # the oracle for the container itself
        assert peer.testzip() is None or "symbolic" in case


def test_a_wrong_checksum_still_tells_the_globals(tmp_path: Path) -> None:
    """C6: a wrong checksum is no way to hide a payload."""
    members = GOOD | {"archive/data.pkl": pickled({"w": Rebuilt(named()), "evil": Call()})}
    entries = entries_of(members)
    entries[0].both = {"crc": 1}
    error = refusal(tmp_path, archive(entries))
    assert isinstance(error, ChecksumMismatch)
    assert "dangerous" in {use.ref.severity for use in error.globals}


def test_a_later_error_still_tells_the_globals(tmp_path: Path) -> None:
    """A12: a payload first, then what breaks the reader."""
    value = [Call(), Rebuilt(named(key="gone"))]
    error = refusal(tmp_path, archived(GOOD | {"archive/data.pkl": pickled(value)}))
    assert "has no record in the archive" in str(error)
    assert "dangerous" in {use.ref.severity for use in error.globals}
    error = refusal(tmp_path, legacy([Call(), Rebuilt(named("0", 4, torch.FloatStorage, "cpu", None))], [], []))
    assert "the list of storages is not that of the tensors" in str(error)
    assert "dangerous" in {use.ref.severity for use in error.globals}


@pytest.mark.parametrize("filler", [b"", bytes(300), b"junk"], ids=["next", "zeros", "junk"])
def test_a_pickle_behind_the_pickle_tells_its_globals(tmp_path: Path, filler: bytes) -> None:
    """A15: torch never reads it, and nobody may hide anything in it."""
    path = tmp_path / "model.pt"
    path.write_bytes(archived(GOOD | {"archive/data.pkl": GOOD["archive/data.pkl"] + filler + pickled(Call())}))
    with open_checkpoint(path) as checkpoint:
        assert [finding.code for finding in checkpoint.findings] == ["trailing-bytes"]
        assert "dangerous" in {use.ref.severity for use in checkpoint.globals}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ["payload.pkl", "payload.dat", "data/sub/0"])
def test_a_pickle_beside_the_checkpoint_s_tells_its_globals(run: Any, tmp_path: Path, name: str, protocol: int) -> None:
    """C18: torch never reads it, but whoever unpacks the archive may."""
    payload = pickle.dumps(Call(), protocol)
    (tmp_path / "model.pt").write_bytes(archive(good(Entry(f"archive/{name}", payload))))
    ran = run("verify", tmp_path / "model.pt")
    assert ran.status == 1
    assert f"posix.system ({name}@" in ran.out


@pytest.mark.parametrize("name", ["notes.txt", "extra.bin"])
def test_what_only_begins_like_a_pickle_names_nothing(run: Any, tmp_path: Path, name: str) -> None:
    begun = (b"config\nof\nthe run\n", b"\x80\x02\x82\x01", b"\x80\x02cq\xff\n\x01\n", b"\x80\x02KK\x01K\x02\x93!")
    for data in begun:
        (tmp_path / "model.pt").write_bytes(archive(good(Entry(f"archive/{name}", data))))
        with open_checkpoint(tmp_path / "model.pt") as checkpoint:
            assert {use.ref.severity for use in checkpoint.globals} == {"safe"}
        assert run("verify", tmp_path / "model.pt").status == 0


def test_pickles_that_begin_everywhere_cost_no_more_than_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(archive(good(Entry("archive/x.bin", b"\x80\x02N" * 2_000_000))))
    with open_checkpoint(tmp_path / "model.pt") as checkpoint:
        assert [finding.code for finding in checkpoint.findings] == ["extra-member"]


def test_a_record_that_expands_too_far_is_stopped(tmp_path: Path) -> None:
    """C7: inflate to the declared size and one byte, not to what the record holds."""
    record = deflated("archive/data/0", bytes(64 << 20), size=16, crc=0)
    path = tmp_path / "model.pt"
    path.write_bytes(archive([entry if entry.name != record.name else record for entry in good()]))
    with open_checkpoint(path) as checkpoint:
        tracemalloc.start()
        with pytest.raises(UnreadableCheckpoint, match="it expands beyond the size it declares; do not trust the file"):
            list(checkpoint.storages[0].source.stream())
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("stored", "message"),
    [(b"\xff" * 9, "its compressed bytes are damaged"), (b"\x03\x00", "do not give the size it declares")],
    ids=["garbage", "short"],
)
def test_a_record_that_does_not_inflate(tmp_path: Path, stored: bytes, message: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(archive(edited("data/0", data=stored, both={"method": 8, "size": 16, "crc": 0})))
    with open_checkpoint(path) as checkpoint, pytest.raises(UnreadableCheckpoint, match=message):
        list(checkpoint.storages[0].source.stream())


def test_bytes_behind_the_compressed_stream(tmp_path: Path) -> None:
    record = deflated("archive/data/0", FOUR_FLOATS)
    record.data += b"hidden"
    path = tmp_path / "model.pt"
    path.write_bytes(archive([entry if entry.name != record.name else record for entry in good()]))
    with open_checkpoint(path) as checkpoint, pytest.raises(UnreadableCheckpoint, match="do not give the size"):
        list(checkpoint.storages[0].source.stream())


def test_many_records_take_linear_time(tmp_path: Path) -> None:
    """C24."""
    path = tmp_path / "model.pt"
    path.write_bytes(archive(good(*(Entry(f"archive/data/{index}") for index in range(1, 30_000)))))
    began = time.process_time()
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.storages) == 30_000
    assert time.process_time() - began < 8


# --- storages of a zip ---------------------------------------------------------------------------------------------


def with_storages(*identifiers: Any, data: bytes = FOUR_FLOATS) -> bytes:
    value = {f"w{index}": Rebuilt(identifier) for index, identifier in enumerate(identifiers)}
    return archived(members_of(value, _0=data))


STORAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    **{
        f"C19 key {key!r:.20}": ((lambda key=key: with_storages(named(key=key))), "is not a plain name")
        for key in ("../data.pkl", "0/../1", "", "k" * 10_000, "a b", "\u0660", "0\n")
    },
    "C19 key number": (lambda: with_storages(named(key=0)), "of other types than torch writes"),
    "E3 overflow": (
        lambda: with_storages(named(numel=0x4000000000000001)),
        "declares 18,446,744,073,709,551,620 bytes and has 16",
    ),
    "E8 more": (lambda: with_storages(named(numel=8)), "the storage '0' declares 32 bytes and has 16"),
    "E8 fewer": (lambda: with_storages(named(numel=2)), "the storage '0' declares 8 bytes and has 16"),
    "E8 negative": (lambda: with_storages(named(numel=-4)), "declares -4 elements"),
    "E9 two dtypes": (
        lambda: with_storages(named(), named(kind=torch.IntStorage)),
        "the storage '0' is declared twice, differently",
    ),
    "E9 two locations": (lambda: with_storages(named(), named(location="cuda:0")), "is declared twice, differently"),
    "E9 two sizes": (lambda: with_storages(named(), named(numel=3)), "is declared twice, differently"),
    "B26 bool count": (lambda: with_storages(named(numel=True), data=FOUR_FLOATS[:4]), "of other types than torch"),
    "E9 bool for int": (
        lambda: archived(
            members_of([Rebuilt(named(numel=1), (1,)), Rebuilt(named(numel=True), (1,))], _0=FOUR_FLOATS[:4])
        ),
        "of other types than torch writes",
    ),
    "B26 float count": (lambda: with_storages(named(numel=4.0)), "of other types than torch writes"),
    "A21 location": (lambda: with_storages(named(location=None)), "of other types than torch writes"),
    "A21 six parts": (lambda: with_storages((*named(), None)), "a storage is named with 6 parts, not 5"),
    "A21 four parts": (lambda: with_storages(named()[:4]), "refers to something that is no storage"),
}


@pytest.mark.parametrize("case", STORAGES)
def test_hostile_storage_is_refused(tmp_path: Path, case: str) -> None:
    make, message = STORAGES[case]
    assert message in str(refusal(tmp_path, make()))


@pytest.mark.parametrize("identifier", ["0", ("storage",), ("module", 1), 7, {}, ()], ids=repr)
def test_hostile_persistent_id_is_refused(tmp_path: Path, identifier: Any) -> None:
    refusal(tmp_path, with_storages(identifier))


# --- the legacy stream ---------------------------------------------------------------------------------------------


def stream_of(*storages: tuple[int, bytes], keys: Any = ("0",), view: Any = None, **options: Any) -> bytes:
    value = {"w": Rebuilt(named("0", 4, torch.FloatStorage, "cpu", view))}
    keys = list(keys) if type(keys) is tuple else keys
    return legacy(value, keys, list(storages or [(4, FOUR_FLOATS)]), **options)


WRONG_LIST = "the list of storages is not that of the tensors"
LEGACY: dict[str, tuple[Callable[[], bytes], str]] = {
    "D1 absent key": (lambda: stream_of(keys=()), WRONG_LIST),
    "D2 another key": (lambda: stream_of(keys=("0", "1")), WRONG_LIST),
    "D2 key twice": (lambda: stream_of(keys=("0", "0")), "the list of storages is damaged"),
    "D2 key number": (lambda: stream_of(keys=(0,)), "the list of storages is damaged"),
    "D2 no list": (lambda: stream_of(keys={"0": 1}), "the list of storages is damaged"),
    "D3 fewer": (lambda: stream_of((3, FOUR_FLOATS)), "the storage '0' declares 4 elements and has 3"),
    "D3 negative": (lambda: stream_of((-4, FOUR_FLOATS)), "declares 4 elements and has -4"),
    "D3 huge": (lambda: stream_of((2**40, FOUR_FLOATS)), "declares 4 elements and has 1,099,511,627,776"),
    "D4 no bytes": (
        lambda: legacy({"w": Rebuilt(named("0", 2**33, torch.FloatStorage, "cpu", None))}, ["0"], [(2**33, b"")]),
        "the storage '0' declares 34,359,738,368 bytes, but the file has",
    ),
    "D4 cut": (lambda: stream_of((4, FOUR_FLOATS[:9])), "the file is truncated: the storage '0' ends at byte"),
    "D5 view offset": (lambda: stream_of(view=("v", 3, 2)), "a view of the storage '0' reaches beyond it"),
    "D5 view size": (lambda: stream_of(view=("v", 0, 5)), "reaches beyond it"),
    "D5 view negative": (lambda: stream_of(view=("v", -1, 2)), "reaches beyond it"),
    "D5 view bool": (lambda: stream_of(view=("v", False, 2)), "is not what torch writes"),
    "D5 view list": (lambda: stream_of(view=["v", 0, 2]), "is not what torch writes"),
    "D5 view short": (lambda: stream_of(view=("v", 0)), "is not what torch writes"),
    "D5 view named as its storage": (lambda: stream_of(view=("0", 0, 4)), "a storage and a view of one have the same"),
    "D7 magic": (lambda: stream_of(magic=MAGIC + 1), "bytes follow the pickle"),
    "D7 protocol": (lambda: stream_of(protocol=1002), "the preamble is not that of torch's format 1001"),
    "D7 protocol bool": (lambda: stream_of(protocol=True), "the preamble is not that of torch's format 1001"),
    "D7 big-endian": (lambda: stream_of(system=SYSTEM | {"little_endian": False}), "with another byte order"),
    "D7 endian number": (lambda: stream_of(system=SYSTEM | {"little_endian": 1}), "with another byte order"),
    "D7 types": (
        lambda: stream_of(system=SYSTEM | {"type_sizes": {"short": 2, "int": 4, "long": 8}}),
        "or other types",
    ),
    "D7 system": (lambda: stream_of(system=[1]), "the system information in the preamble is damaged"),
    "A16 code in the preamble": (lambda: stream_of(system=SYSTEM | {"x": Call()}), "names code, which torch never"),
    "A16 code for the magic": (lambda: pickled(Call()) + stream_of()[15:], "bytes follow the pickle"),
    "A21 five parts": (lambda: legacy({"w": Rebuilt(named())}, ["0"], [(4, FOUR_FLOATS)]), "with 5 parts, not 6"),
    "E9 two dtypes": (
        lambda: legacy(
            [Rebuilt(named("0", 4, kind, "cpu", None)) for kind in (torch.FloatStorage, torch.IntStorage)],
            ["0"],
            [(4, FOUR_FLOATS)],
        ),
        "the storage '0' is declared twice, differently",
    ),
    "D5 two views of one name": (
        lambda: legacy(
            [Rebuilt(named("0", 4, torch.FloatStorage, "cpu", ("v", at, 1)), (1,)) for at in (0, 1)],
            ["0"],
            [(4, FOUR_FLOATS)],
        ),
        "the storage view 'v' is declared twice, differently",
    ),
    "only the magic": (lambda: pickled(MAGIC), ""),
}


@pytest.mark.parametrize("case", LEGACY)
def test_hostile_legacy_stream_is_refused(tmp_path: Path, case: str) -> None:
    make, message = LEGACY[case]
    assert message in str(refusal(tmp_path, make()))


def test_bytes_behind_a_legacy_stream_are_told(tmp_path: Path) -> None:
    """D6: torch ignores them."""
    assert codes(tmp_path, stream_of(tail=b"x")) == ["trailing-bytes"]
    assert codes(tmp_path, stream_of()) == []


@pytest.mark.parametrize("filler", [b"", bytes(300), b"junk"], ids=["next", "zeros", "junk"])
def test_a_pickle_behind_a_legacy_stream_tells_its_globals(tmp_path: Path, filler: bytes) -> None:
    """A15: a second torch.load of the open file would read it."""
    path = tmp_path / "model.pt"
    path.write_bytes(stream_of(tail=filler + pickled(Call())))
    with open_checkpoint(path) as checkpoint:
        assert [finding.code for finding in checkpoint.findings] == ["trailing-bytes"]
        assert "dangerous" in {use.ref.severity for use in checkpoint.globals}


def test_legacy_source_is_never_used(tmp_path: Path) -> None:
    """D8: the stream of an old module carries its source text; it stays text."""
    data = torch_bytes(torch.nn.Linear(2, 2), _use_new_zipfile_serialization=False)
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    with open_checkpoint(path) as checkpoint:
        assert not any(use.ref.severity == "dangerous" for use in checkpoint.globals)


# --- safetensors ---------------------------------------------------------------------------------------------------


def entry(dtype: str = "U8", shape: str = "[4]", offsets: str = "[0,4]", more: str = "") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{more}}}'


def one(*arguments: str, **named_arguments: str) -> bytes:
    return safetensors_file(f'{{"w":{entry(*arguments, **named_arguments)}}}', b"abcd")


def two(first: str, second: str, names: tuple[str, str] = ("a", "b"), data: bytes = b"abcd") -> bytes:
    header = f'{{"{names[0]}":{entry(shape="[2]", offsets=first)},"{names[1]}":{entry(shape="[2]", offsets=second)}}}'
    return safetensors_file(header, data)


def header_length(length: int) -> bytes:
    return length.to_bytes(8, "little") + one()[8:]


INVALID = "the safetensors header is not valid JSON"
NO_SIZE = "has a size or an offset that is no number of elements or bytes"
SAFETENSORS: dict[str, tuple[Callable[[], bytes], str]] = {
    "F1 header beyond": (
        lambda: header_length(99_999_999),
        "the file is truncated: its header declares 99,999,999 bytes",
    ),
    "F1 header huge": (lambda: header_length(100_000_001), "more than the 100,000,000 allowed"),
    "F1 header 2^63": (lambda: header_length(1 << 63), "more than the 100,000,000 allowed"),
    "F1 header short": (lambda: header_length(20), INVALID),
    "F1 no header": (lambda: header_length(0), ""),
    "F1 seven bytes": (lambda: one()[:7], ""),
    "F2 hole": (
        lambda: two("[0,2]", "[3,5]", data=b"abcde"),
        "begins at byte 3, not at 2 where the one before it ends",
    ),
    "F2 overlap": (lambda: two("[0,2]", "[1,3]", data=b"abc"), "begins at byte 1, not at 2"),
    "F2 alias": (lambda: two("[0,2]", "[0,2]", data=b"ab"), "begins at byte 0, not at 2"),
    "F2 start": (lambda: one(offsets="[1,5]"), "begins at byte 1, not at 0"),
    "F2 backwards": (lambda: one(offsets="[4,0]"), "occupies -4 bytes"),
    "F2 trailing": (lambda: one() + b"x", "1 bytes follow the last tensor"),
    "F2 truncated": (lambda: one()[:-1], "the file is truncated: its tensors need 4 bytes and 3 are there"),
    "F3 name twice": (lambda: two("[0,2]", "[2,4]", ("a", "a")), "holds 'a' twice, and readers differ"),
    "F3 same range": (
        lambda: safetensors_file(f'{{"w":{entry("F32", "[1]")},"w":{entry("I32", "[1]")}}}', b"abcd"),
        "holds 'w' twice, and readers differ",
    ),
    "F3 escaped twin": (lambda: two("[0,2]", "[2,4]", ("a", "\\u0061")), "holds 'a' twice"),
    "F4 metadata twice": (
        lambda: safetensors_file(f'{{"__metadata__":{{}},"__metadata__":{{}},"w":{entry()}}}', b"abcd"),
        "holds '__metadata__' twice",
    ),
    "F4 inner twice": (
        lambda: safetensors_file(f'{{"__metadata__":{{"a":"1","a":"2"}},"w":{entry()}}}', b"abcd"),
        "holds 'a' twice",
    ),
    "F4 dtype twice": (lambda: one(more=',"dtype":"U8"'), "holds 'dtype' twice"),
    "F5 size": (lambda: one(shape="[5]"), "occupies 4 bytes, but its shape and dtype ask for 5"),
    "F5 overflow": (lambda: one(shape="[9223372036854775807,9,0]"), "has more elements than can be counted"),
    "F5 negative": (lambda: one(shape="[-4]"), "holds -4, which is no size"),
    "F5 minus zero": (lambda: one(shape="[4,-0]"), "holds -0, which is no size"),
    "F5 float": (lambda: one(shape="[4.0]"), "holds 4.0, which is no size"),
    "F5 exponent": (lambda: one(shape="[4e0]"), "holds 4e0, which is no size"),
    "F5 bool": (lambda: one(shape="[true,4]"), NO_SIZE),
    "F5 text": (lambda: one(shape='["4"]'), NO_SIZE),
    "F5 2^64": (lambda: one(shape="[18446744073709551616]"), NO_SIZE),
    "F5 offset bool": (lambda: one(offsets="[false,4]"), NO_SIZE),
    "F5 three offsets": (lambda: one(offsets="[0,4,4]"), "has a dtype, shape or data_offsets of another type"),
    "F5 dimensions": (lambda: one(shape=f"[{','.join(['1'] * 99)}]"), "has 99 dimensions, more than any tensor"),
    "F5 unknown dtype": (lambda: one(dtype="F12"), "has the unknown dtype 'F12'"),
    "F5 dtype number": (
        lambda: safetensors_file('{"w":{"dtype":1,"shape":[],"data_offsets":[0,4]}}', b"abcd"),
        "of another",
    ),
    "F5 no shape": (lambda: safetensors_file('{"w":{"dtype":"U8","data_offsets":[0,4]}}', b"abcd"), "lacks its dtype"),
    "F5 entry list": (lambda: safetensors_file('{"w":["U8",[4],[0,4]]}', b"abcd"), "lacks its dtype"),
    "F6 byte order mark": (lambda: safetensors_file(b"\xef\xbb\xbf" + one()[8:-4], b"abcd"), ""),
    "F6 NUL pad": (lambda: safetensors_file(one()[8:-4] + b"\0\0", b"abcd"), INVALID),
    "F6 junk behind": (lambda: safetensors_file(one()[8:-4] + b" x", b"abcd"), INVALID),
    "F7 not UTF-8": (lambda: safetensors_file(b'{"\xff":1}'), "the safetensors header is not UTF-8"),
    "F7 half a character": (lambda: safetensors_file(f'{{"\\ud800":{entry()}}}', b"abcd"), INVALID),
    "F7 half a character in metadata": (
        lambda: safetensors_file(f'{{"__metadata__":{{"a":"\\udfff"}},"w":{entry()}}}', b"abcd"),
        INVALID,
    ),
    "F7 raw control": (lambda: safetensors_file(f'{{"a\nb":{entry()}}}', b"abcd"), INVALID),
    "F8 NaN": (lambda: one(shape="[NaN]"), "holds NaN, which is no size"),
    "F8 Infinity": (lambda: one(more=',"x":-Infinity'), "holds -Infinity, which is no size"),
    "F8 digits": (lambda: one(shape=f"[{'9' * 5000}]"), INVALID),
    "F8 nesting": (lambda: one(more=',"x":' + "[" * 100_000), INVALID),
    "F8 closed nesting": (lambda: one(more=',"x":' + "[" * 100_000 + "]" * 100_000), INVALID),
    "F9 hidden data": (lambda: one(more=',"x":[1]'), "has unknown fields that hide more data"),
    "F10 number": (
        lambda: safetensors_file('{"__metadata__":{"a":1}}'),
        "the safetensors metadata holds something other",
    ),
    "F10 nested": (lambda: safetensors_file('{"__metadata__":{"a":{}}}'), "something other than text"),
    "F10 list": (lambda: safetensors_file('{"__metadata__":[]}'), "something other than text"),
    "F11 tensor named metadata": (
        lambda: safetensors_file(f'{{"__metadata__":{entry()}}}', b"abcd"),
        "something other than text",
    ),
    "F13 odd nibbles": (lambda: one(dtype="F4", shape="[7]"), "its shape and dtype ask for 3.5"),
    "F13 odd rows": (lambda: one(dtype="F4", shape="[8,1]"), "do not fill whole bytes in its last dimension"),
    "F13 six bits": (lambda: one(dtype="F6_E2M3", shape="[5]"), "its shape and dtype ask for 3.75"),
    "entry number": (lambda: safetensors_file('{"w":1}'), "lacks its dtype, shape or data_offsets"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_hostile_safetensors_is_refused(tmp_path: Path, case: str) -> None:
    make, message = SAFETENSORS[case]
    assert message in str(refusal(tmp_path, make()))


def test_many_empty_tensors_take_linear_time_and_memory(tmp_path: Path) -> None:
    """F12."""
    header = ",".join(f'"t{index}":{entry(shape="[0]", offsets="[0,0]")}' for index in range(20_000))
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_file(f"{{{header}}}"))
    began = time.process_time()
    tracemalloc.start()
    with open_checkpoint(path) as checkpoint:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(checkpoint.root) == 20_000
    assert peak < 20 * len(header)
    assert time.process_time() - began < 10


def test_names_are_data(tmp_path: Path) -> None:
    """F11: names are read as they are, however odd."""
    names = ["", "a\\u0000b", "\\u001b[2J", "n" * 100_000, "e\\u0301", "\\u00e9", "\\u202e"]
    header = ",".join(
        f'"{name}":{entry(shape="[1]", offsets=f"[{index},{index + 1}]")}' for index, name in enumerate(names)
    )
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_file(f"{{{header}}}", bytes(len(names))))
    with open_checkpoint(path) as checkpoint:
        expected = ["", "a\0b", "\x1b[2J", "n" * 100_000, "e\u0301", "\u00e9", "\u202e"]
        assert list(tensors_of(checkpoint)) == expected


# --- the file itself -----------------------------------------------------------------------------------------------


def test_a_sparse_terabyte_is_refused_at_once(tmp_path: Path) -> None:
    """D19."""
    path = tmp_path / "model.pt"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    began = time.monotonic()
    with pytest.raises(UnreadableCheckpoint, match="the file is filled with zeros"):
        open_checkpoint(path)
    assert time.monotonic() - began < 2


def test_a_sparse_terabyte_behind_a_good_start(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(stream_of())
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    with open_checkpoint(path) as checkpoint:
        assert isinstance(checkpoint.root.get("w"), TensorSpec)
        assert [finding.code for finding in checkpoint.findings] == ["trailing-bytes"]


def test_a_pickle_that_claims_the_whole_sparse_file(tmp_path: Path) -> None:
    """B11: a length is compared with what is there before anything is read or allocated for it."""
    path = tmp_path / "model.pt"
    head = b"".join(pickled(part) for part in (MAGIC, 1001, SYSTEM))
    path.write_bytes(head + b"\x80\x04\x8e" + struct.pack("<Q", 1 << 39))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    began = time.monotonic()
    with pytest.raises(UnreadableCheckpoint):
        open_checkpoint(path)
    assert time.monotonic() - began < 10


def test_nothing_is_imported_or_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A1, A27, A28: no loader of others is ever asked."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a checkpoint was run")

    for module, name in ((pickle, "loads"), (pickle, "load"), (torch, "load"), (zipfile, "ZipFile")):
        monkeypatch.setattr(module, name, refuse)
    data = archive(entries_of(GOOD | {"archive/data.pkl": pickled({"w": Rebuilt(named()), "evil": Call()})}))
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    with open_checkpoint(path) as checkpoint:
        assert "dangerous" in {use.ref.severity for use in checkpoint.globals}


def _patched(data: bytes, signature: bytes, offset: int, value: bytes) -> bytes:
    at = data.index(signature) + offset
    return data[:at] + value + data[at + len(value) :]


# The call comes after a tensor, whose storage is in no archive that can be opened.
EVIL = zipfile_bytes({"archive/data.pkl": pickled({"w": Rebuilt(named()), "x": Call()}), "archive/data/0": FOUR_FLOATS})
RUINS: dict[str, bytes] = {
    "cut short": EVIL[:-60],
    "cut short, compressed": zipfile_bytes(GOOD | {"archive/data.pkl": pickled(Call())}, zipfile.ZIP_DEFLATED)[:-30],
    "bytes behind": EVIL + b"??",
    "bytes before": b"?" * 40 + EVIL,
    "an unknown compression": _patched(EVIL, b"PK\1\2", 10, b"\x63\0"),
    "marked as encrypted": _patched(EVIL, b"PK\1\2", 8, b"\1"),
    "twice": archive([*entries_of({"archive/data.pkl": pickled(Call())}), *entries_of(GOOD)]),
    "in two folders": archive(entries_of(GOOD | {"other/data.pkl": pickled(Call())})),
    "a pickle before": pickled(Call()) + archive(entries_of(GOOD)),
    "inside a broken archive": zipfile_bytes({"in/model.pt": EVIL})[:-30],
}


@pytest.mark.parametrize("case", RUINS)
def test_a_broken_archive_hides_no_name(case: str, run: Callable[..., Any], tmp_path: Path) -> None:
    """Other tools repair such files, or read them less strictly: what they would meet is told, and nothing is fixed."""
    path = tmp_path / "model.pt"
    path.write_bytes(RUINS[case])
    ran = run("inspect", path, "--json")
    safety = json.loads(ran.out)["safety"]
    assert (ran.status, safety["verdict"]) == (2, "dangerous")
    assert [use["name"] for use in safety["globals"] if use["severity"] == "dangerous"] == ["posix.system"]
    assert {use["name"] for use in safety["globals"] if use["severity"] == "unknown"} == set()
    checks = {check["id"]: check for check in json.loads(run("verify", path, "--json").out)["checks"]}
    assert (checks["integrity"]["status"], checks["safety"]["status"]) == ("fail", "fail")


@pytest.mark.parametrize("data", [GOOD["archive/data.pkl"][:20], zipfile_bytes(GOOD)[:-60], b"PK\3\4" * 5000])
def test_what_cannot_be_read_is_never_called_safe(data: bytes, run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    ran = run("verify", path, "--json")
    assert ran.status == 2
    assert [(check["id"], check["status"]) for check in json.loads(ran.out)["checks"]] == [("integrity", "fail")]
