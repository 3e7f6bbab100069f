"""Safetensors files that each hold the parts of one rank.

Source: torch/distributed/checkpoint/_hf_utils.py (names, metadata) and hf_storage.py; ``save_distributed=True`` of
HuggingFaceStorageWriter writes them. No file says how large a whole tensor is, only where its parts begin.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from ckptool.errors import IncompleteCheckpoint
from ckptool.formats.file import listing
from ckptool.model.checkpoint import Finding
from ckptool.model.places import RemotePath

PARTS_FIELD = "DCP_SHARDING_INFO"  # of the metadata: per tensor, where its part begins
_RANK_NAME = re.compile(r"shard-(?P<rank>\d{5})-(?P<rest>.+)", re.DOTALL)
_JOIN = (
    "put the parts of all ranks together first, with consolidate_safetensors_files of"
    " torch.distributed.checkpoint._consolidate_hf_safetensors"
)


def require_one_rank(names: Iterable[str]) -> None:
    """Refuse files of one checkpoint that differ in the rank alone.

    :raises IncompleteCheckpoint: they do.
    """
    matches = list(map(_RANK_NAME.fullmatch, names))
    if len(matches) > 1 and all(matches) and len({match["rest"] for match in matches if match}) == 1:
        raise IncompleteCheckpoint(f"the folder holds the parts of {len(matches)} ranks, not whole tensors; {_JOIN}")


def parts_of_one_rank(path: Path, text: str) -> tuple[Finding, ...]:
    """Tell of a file that may hold parts of tensors; ``text`` is its ``PARTS_FIELD``.

    :raises IncompleteCheckpoint: it does: a part begins inside of its tensor, or other ranks wrote files beside it.
    """
    match = _RANK_NAME.fullmatch(path.name)
    beside = [] if match is None or isinstance(path, RemotePath) else _of_other_ranks(path, match)
    if beside or _is_inside(text):
        others = f" ({beside[0]!r:.100} holds others)" if beside else ""
        raise IncompleteCheckpoint(f"this file holds one rank's parts of tensors{others}; {_JOIN}")
    return (Finding("one-rank", "one rank wrote this file: where there were others, its tensors are parts"),)


def _of_other_ranks(path: Path, match: re.Match[str]) -> list[str]:
    found = filter(None, map(_RANK_NAME.fullmatch, listing(path.parent)))
    return [other[0] for other in found if other["rest"] == match["rest"] and other["rank"] != match["rank"]]


def _is_inside(text: str) -> bool:
    try:
        places = json.loads(text)
    except (ValueError, RecursionError):
        return False
    entries = places.values() if isinstance(places, dict) else ()
    starts = [entry.get("saved_offsets") for entry in entries if isinstance(entry, dict)]
    return any(any(start) for start in starts if isinstance(start, list))
