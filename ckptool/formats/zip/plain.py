"""An archive as torch writes it: records stored back to back, in the order of the directory."""

from __future__ import annotations

from ckptool.formats.file import InputFile
from ckptool.formats.zip.layout import (
    BLOCK_BYTES,
    CENTRAL,
    CENTRAL_SIGNATURE,
    DESCRIPTOR_SIGNATURE,
    HAS_DESCRIPTOR,
    IN_ZIP64,
    IS_FOLDER,
    IS_UTF8,
    KNOWN_FLAGS,
    LOCAL,
    LOCAL_SIGNATURE,
    NO_NUMBERS,
    STORED,
    End,
    Record,
)
from ckptool.formats.zip.names import check_names
from ckptool.model.rows import make_rows

_ODD_ATTRIBUTES = IS_FOLDER | 0o170000 << 16  # what Unix calls the type of a file stands in the upper half


def read_plain_records(file: InputFile, directory: bytes, end: End) -> list[Record] | None:
    """Read records that are stored back to back, in the order of the directory and without 64-bit fields.

    Anything else gives None: the general way, which takes three times as long, looks closer and knows what to say. All
    that it demands of such records is demanded here, in one loop because there may be 50,000 of them.
    """
    raw_names: list[bytes] = []
    numbers: list[tuple[int, int, int]] = []
    block, base, reach = b"", 0, 0
    at = position = 0
    plain: tuple[int, ...] = ()
    shared_flags = KNOWN_FLAGS
    beginning = start = descriptor = b""
    for _ in range(end.entries):
        if at + CENTRAL.size > len(directory):
            return None
        (signature, _, _, flags, method, _, _, crc, stored, nbytes, name_size, extra_size, comment_size, disk, _,
         attributes, header) = CENTRAL.unpack_from(directory, at)  # fmt: skip
        if signature != CENTRAL_SIGNATURE or stored != nbytes or IN_ZIP64 in (stored, header):
            return None
        common = (flags, method, extra_size, comment_size, disk, attributes)
        if common != plain:  # what nearly all have in common is looked at once
            if flags & ~KNOWN_FLAGS or method or extra_size or comment_size or disk or attributes & _ODD_ATTRIBUTES:
                return None
            plain = common
            shared_flags &= flags
        if directory[at + 6 : at + 16] != beginning:
            beginning = directory[at + 6 : at + 16]
            start = LOCAL_SIGNATURE + beginning
        figures = directory[at + 16 : at + 28]
        name_at = at + CENTRAL.size
        raw_name = directory[name_at : name_at + name_size]
        # The descriptor of the record before stands in front of this one's header.
        header_at = position + len(descriptor)
        header_end = header_at + LOCAL.size + name_size
        if header_end > reach:
            block = file.read(position, min(BLOCK_BYTES + name_size, file.size - position))
            base, reach = position, position + len(block)
        local = start + (NO_NUMBERS if flags & HAS_DESCRIPTOR else figures) + directory[at + 28 : at + 30]
        place = header_at - base
        if (
            header != header_at
            or header_end > reach
            or not block.startswith(descriptor + local, position - base)
            or not block.startswith(raw_name, place + LOCAL.size)
        ):
            return None
        offset = header_end + block[place + 28] + (block[place + 29] << 8)
        position = offset + stored
        descriptor = DESCRIPTOR_SIGNATURE + figures if flags & HAS_DESCRIPTOR else b""
        raw_names.append(raw_name)
        numbers.append((crc, nbytes, offset))
        at = name_at + name_size
    if at != len(directory) or position + len(descriptor) != end.offset:
        return None
    if descriptor and file.read(position, len(descriptor)) != descriptor:
        return None
    names = _decode_names(raw_names, shared_flags)
    if names is None:
        return None
    check_names(names)
    crcs, sizes, offsets = zip(*numbers, strict=True) if numbers else ((), (), ())
    return make_rows(Record, names, [STORED] * len(names), crcs, sizes, sizes, offsets)


def _decode_names(raw_names: list[bytes], flags: int) -> list[str] | None:
    """Decode all names at once; None where a code page would have to be asked, or a name has a NUL or is no UTF-8."""
    listing = b"\0".join(raw_names)
    if (not listing.isascii() and not flags & IS_UTF8) or listing.count(b"\0") >= max(len(raw_names), 1):
        return None
    try:
        return listing.decode().split("\0") if raw_names else []
    except UnicodeDecodeError:
        return None
