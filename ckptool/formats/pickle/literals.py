"""Numbers and texts as pickles spell them; a spelling that two readers could take differently is refused.

Sources: CPython's Lib/pickle.py and Lib/pickletools.py.
"""

from __future__ import annotations

import codecs
import re
from typing import Any

from ckptool.formats.pickle import limits
from ckptool.formats.pickle.reading import Malformed, Reading
from ckptool.model.values import GlobalRef, Stub

_INTEGER = re.compile(rb"-?(?:0|[1-9][0-9]*)\Z")
_INDEX = re.compile(rb"[0-9]{1,10}\Z")
_FLOAT = re.compile(rb"[+-]?(?:[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|inf|nan)\Z")
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|[0-7]{1,3}|[\\'\"abfnrtv]|\n)?")
_ESCAPED = {
    b"\\": b"\\", b"'": b"'", b'"': b'"', b"a": b"\a", b"b": b"\b", b"f": b"\f",
    b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v", b"\n": b"",
}  # fmt: skip

_BIG = GlobalRef("builtins", "int", "safe")


def read_integer(line: bytes) -> Any:
    """Read the operand of INT, which also spells True and False."""
    if line in (b"00", b"01"):
        return line == b"01"
    return _decimal(line)


def read_long(line: bytes) -> Any:
    """Read the operand of LONG; a trailing L is Python 2's."""
    return _decimal(line[:-1] if line.endswith(b"L") else line)


def _decimal(line: bytes) -> Any:
    if not _INTEGER.match(line):
        raise Malformed("holds an integer that is not written as one")
    return int(line) if len(line) <= limits.DIGITS else _big_integer(len(line) * 10 // 24)


def _big_integer(nbytes: int) -> Stub:
    """Stand in for an integer of more than 64 bytes, whose mere printing would take minutes."""
    return Stub(_BIG, (f"<integer of {nbytes} bytes>",))


def read_bytes_integer(data: bytes) -> Any:
    """Read the operand of LONG1 and LONG4: two's complement, least byte first."""
    if len(data) > limits.INTEGER_BYTES:
        return _big_integer(len(data))
    return int.from_bytes(data, "little", signed=True)


def read_float(line: bytes) -> float:
    """Read the operand of FLOAT."""
    if len(line) > limits.DIGITS or not _FLOAT.match(line):
        raise Malformed("holds a number that is not written as one")
    return float(line)


def read_index(line: bytes) -> int:
    """Read the operand of PUT and GET."""
    if not _INDEX.match(line) or int(line) >= 1 << 32:
        raise Malformed("holds a memo index that is none")
    return int(line)


def read_text(data: bytes, reading: Reading) -> str:
    """Decode text; the lone surrogates that Python's pickler passes on are kept and noted."""
    if len(data) > limits.TEXT_CHARACTERS:
        raise Malformed(f"holds a text of {len(data)} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        pass
    try:
        text = data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        raise Malformed("holds a text that is not UTF-8") from None
    reading.note("surrogate-text", "holds a text with half a character, which UTF-8 forbids")
    return text


def read_escaped_text(line: bytes) -> str:
    """Decode the operand of UNICODE."""
    if len(line) > limits.TEXT_CHARACTERS:
        raise Malformed(f"holds a text of {len(line)} bytes")
    try:
        return codecs.raw_unicode_escape_decode(line)[0]  # by name, Python would import a module for it
    except UnicodeDecodeError:
        raise Malformed("holds a text with a broken escape") from None


def read_python2_text(data: bytes) -> str | bytes:
    """Take Python 2's only string type as text where it is text."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def read_quoted_text(line: bytes) -> str | bytes:
    """Read the operand of STRING: a literal as Python 2 quotes it."""
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise Malformed("holds a string without its quotes")
    return read_python2_text(_ESCAPE.sub(_unescape, line[1:-1]))


def _unescape(match: re.Match[bytes]) -> bytes:
    code: bytes | None = match[1]
    if code is None:
        raise Malformed("holds a string with a broken escape")
    if code in _ESCAPED:
        return _ESCAPED[code]
    return bytes([int(code[1:], 16) if code[:1] == b"x" else int(code, 8) & 0xFF])
