"""The quick way through a zip archive as torch writes it against the general way: nobody may tell them apart."""

from __future__ import annotations

import io
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats import zip as zip_format
from ckptool.formats.file import InputFile


def outcome(data: bytes) -> Any:
    """Give all that reading an archive tells."""
    fd = os.memfd_create("archive")
    os.write(fd, data)
    file = InputFile(Path("archive.pt"), fd)
    try:
        archive = zip_format.read_archive(file)
        return list(archive.records.items()), archive.findings
    except UnreadableCheckpoint as error:
        return type(error), str(error)
    finally:
        file.close()


class BothWays:
    """Read archives in both ways; count those for which the quick one does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._read_plain_records = zip_format.read_plain_records
        self.quick = 0

    def _read(self, *arguments: Any) -> Any:
        records = self._read_plain_records(*arguments)
        self.quick += records is not None
        return records

    def compare(self, data: bytes) -> Any:
        """Demand the same of both ways, and give it."""
        self._patch.setattr(zip_format, "read_plain_records", self._read)
        quick = outcome(data)
        self._patch.setattr(zip_format, "read_plain_records", lambda file, directory, end: None)
        assert quick == outcome(data)
        return quick


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> BothWays:
    """Give the comparison of both ways."""
    return BothWays(monkeypatch)


def saved(value: Any) -> bytes:
    """Give what torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def zipped(method: int = zipfile.ZIP_STORED, names: tuple[str, ...] = ("a/data.pkl", "a/data/0"), **info: Any) -> bytes:
    """Give what Python's zipfile writes, with other properties of the last record."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in names:
            entry = zipfile.ZipInfo(name)
            entry.compress_type = method
            for key, value in info.items() if name == names[-1] else ():
                setattr(entry, key, value)
            archive.writestr(entry, name.encode() * 9)
    return file.getvalue()


def without_checksums() -> bytes:
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        return saved({"w": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(computed)


ARCHIVES: dict[str, tuple[Callable[[], bytes], bool]] = {
    "torch": (lambda: saved({"w": torch.ones(3), "b": torch.ones(0)}), True),
    "many records, large ones": (lambda: saved([torch.ones(size) for size in range(0, 9000, 30)]), True),
    "no checksums": (without_checksums, True),
    "no records": (lambda: zipped(names=()), True),
    "zipfile": (zipped, True),
    "zipfile, a folder": (lambda: zipped(names=("a/", "a/data.pkl")), True),
    "zipfile, names that are no ASCII": (lambda: zipped(names=("ä/data.pkl", "ä/ж")), True),
    "zipfile, a name twice": (lambda: zipped(names=("a/x", "a/X")), True),
    "zipfile, a name that is none": (lambda: zipped(names=("a/x", "a/../y")), True),
    "deflated": (lambda: zipped(zipfile.ZIP_DEFLATED), False),
    "a comment": (lambda: zipped(comment=b"!"), False),
    "an extra field": (lambda: zipped(extra=b"FB\2\0ZZ"), False),
    "a link": (lambda: zipped(create_system=3, external_attr=0o120777 << 16), False),
    "marked as a folder": (lambda: zipped(external_attr=0x10), False),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(both: BothWays, name: str) -> None:
    make, is_plain = ARCHIVES[name]
    found = both.compare(make())
    assert both.quick == (is_plain and isinstance(found[0], list))


def test_every_flipped_bit_outside_the_payloads(both: BothWays) -> None:
    data = saved([])
    payload = data.index(b"PK", 4) - 200
    for position in [*range(64), *range(payload, len(data))]:
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            both.compare(bytes(flipped))
    assert both.quick


def test_every_cut(both: BothWays) -> None:
    data = saved([])
    for end in range(len(data)):
        both.compare(data[:end])


def test_changed_fields(both: BothWays) -> None:
    """Write other numbers, those of neighbours above all, over those of headers, descriptors and the directory."""
    data = saved([torch.ones(2), torch.zeros(3)])
    chance = random.Random(0)
    places = [at + offset for at in range(len(data)) if data.startswith(b"PK", at) for offset in range(4, 46)]
    for _ in range(3000):
        source, target, size = chance.choice(places), chance.choice(places), chance.choice([1, 2, 4])
        piece = chance.choice([data[source : source + size], b"\xff" * size, bytes(size)])
        both.compare(data[:target] + piece + data[target + size :])
    assert both.quick


def test_records_in_another_order(both: BothWays) -> None:
    data = saved([])
    start, end = data.index(b"PK\1\2"), data.index(b"PK\6\6")
    entries = [b"PK\1\2" + entry for entry in data[start:end].split(b"PK\1\2")[1:]]
    found = both.compare(data[:start] + b"".join(entries[::-1]) + data[end:])
    assert both.quick == 0
    assert isinstance(found[0], list)


def stated_twice(local_at: int, central_at: int, piece: bytes) -> bytes:
    """Write the same over a field of the first local header and of the first central entry."""
    data = bytearray(zipped())
    central = data.index(b"PK\1\2")
    data[local_at : local_at + len(piece)] = piece
    data[central + central_at : central + central_at + len(piece)] = piece
    return bytes(data)


def with_directory(before: bytes, after: bytes) -> bytes:
    """Insert bytes around the directory, which the end record then counts as part of it or not."""
    data = zipped()
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    size = (end - start + len(after)).to_bytes(4, "little")
    offset = (start + len(before)).to_bytes(4, "little")
    return data[:start] + before + data[start:end] + after + data[end : end + 12] + size + offset + b"\0\0"


AGREED: dict[str, Callable[[], bytes]] = {
    "encrypted": lambda: stated_twice(6, 8, b"\1\0"),
    "unknown flags": lambda: stated_twice(6, 8, b"\0\x40"),
    "deflated": lambda: stated_twice(8, 10, b"\x08\0"),
    "an unknown method": lambda: stated_twice(8, 10, b"\x63\0"),
    "more than is stored": lambda: stated_twice(22, 24, b"\xff\0\0\0"),
    "64 bits without a field": lambda: stated_twice(18, 20, b"\xff" * 8),
    "bytes before the directory": lambda: with_directory(b"junk", b""),
    "bytes in the directory": lambda: with_directory(b"", b"junk"),
}


@pytest.mark.parametrize("name", AGREED)
def test_what_both_headers_agree_on(both: BothWays, name: str) -> None:
    both.compare(AGREED[name]())
    assert both.quick == 0
