"""Find the files in which the other ranks saved their parts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ckptool.layouts import is_shard, share_of
from ckptool.layouts.segments import quoted

_MOST_RANKS = 4096


def other_ranks_text(path: Path, entries: Iterable[Any]) -> str:
    """Name the files beside this one that hold what is missing of its sharded tensors; empty where none is found."""
    shard = next((value for value in entries if is_shard(value)), None)
    if shard is None:
        return ""
    share = share_of(shard)
    found = [] if share.rank is None else _files_of(path, share.rank, share.ranks[:_MOST_RANKS])
    return f"; beside it: {quoted(found)}" if found else ""


def _files_of(path: Path, rank: int, ranks: Iterable[int]) -> list[str]:
    """Try each number in the file's name that is this rank (``model_rank0.pt``); the last one is the likeliest."""
    others = [other for other in ranks if other != rank]
    for number in reversed(list(re.finditer(r"\d+", path.name))):
        if int(number[0]) == rank:
            start, end = number.span()
            width = len(number[0])
            names = [f"{path.name[:start]}{other:0{width}}{path.name[end:]}" for other in others]
            found = [name for name in names if path.with_name(name).is_file()]
            if found:
                return found
    return []
