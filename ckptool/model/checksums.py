"""The checksum of zip records, computed as fast as the machine can."""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32 as crc32
except ImportError:  # no wheel for this platform: the same numbers, five times slower
    from zlib import crc32 as crc32

__all__ = ["crc32", "crc32_behind"]

_POLYNOMIAL = 0xEDB88320  # of CRC-32 (ISO 3309), the highest power in the lowest bit
_ONE, _X = 1 << 31, 1 << 30


def crc32_behind(whole: int, head: int, nbytes: int) -> int:
    """Give the checksum of the last ``nbytes`` bytes of data from the checksums of the whole and of what is before.

    The checksum of two parts is that of the first, times x to the power of the second's length in bits, plus that of
    the second (zlib's ``crc32_combine``).
    """
    power, square, bits = _ONE, _X, 8 * nbytes
    while bits:
        if bits & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        bits >>= 1
    return whole ^ _multiply(power, head)


def _multiply(one: int, other: int) -> int:
    """Multiply two polynomials over two elements, modulo that of the checksum."""
    product = 0
    for power in range(31, -1, -1):
        if one >> power & 1:
            product ^= other
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product
