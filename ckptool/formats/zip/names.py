"""The names of records: no two readers may look one up differently."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ckptool.errors import UnreadableCheckpoint
from ckptool.formats.zip.layout import REZIP

# What no record name may hold, once every name stands between two NULs.
_FORBIDDEN_PARTS = ("\\", "//", "\0/", "\0\0")
_DOTS_END = ("./", ".\0")  # as do few names, and all that have a segment of dots alone
_DOTS = re.compile(r"[/\0]\.\.?[/\0]")
_DRIVE = re.compile(r"\0[A-Za-z]:/")


def check_names(names: list[str]) -> None:
    """Refuse what two readers could look up differently: torch ignores case and stops at a NUL."""
    # All names at once, because a search in one long text costs less than a million short ones.
    listing = "\0".join(["", *names, ""])
    is_plain = listing.count("\0") == len(names) + 1 and not _is_forbidden(listing)
    if not is_plain or len(set(listing.lower().split("\0"))) != len(names) + 1:
        _refuse_names(names)


def _is_forbidden(listing: str) -> bool:
    """Tell whether a name between two NULs is no plain path, or one of many."""
    return (
        any(part in listing for part in _FORBIDDEN_PARTS)
        or (any(end in listing for end in _DOTS_END) and _DOTS.search(listing) is not None)
        or (":/" in listing and _DRIVE.search(listing) is not None)
    )


def _refuse_names(names: Iterable[str]) -> None:
    """Say which name is at fault."""
    seen: dict[str, str] = {}
    for name in names:
        key = name.lower()
        if "\0" in name or _is_forbidden(f"\0{name}\0"):
            raise UnreadableCheckpoint(f"the record name {name!r:.100} is not a plain path; {REZIP}")
        if key in seen:
            how = "twice" if seen[key] == name else f"beside {seen[key]!r:.100}, and torch ignores case"
            raise UnreadableCheckpoint(
                f"the zip archive is ambiguous: it holds the record {name!r:.100} {how}; {REZIP}"
            )
        seen[key] = name
