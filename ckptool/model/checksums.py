"""The checksum of zip records, computed as fast as the machine can."""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32 as crc32
except ImportError:  # no wheel for this platform: the same numbers, five times slower
    from zlib import crc32 as crc32

__all__ = ["crc32"]
