"""What load_into found and did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckptool.model.plans import Certainty, KeyMove, Note


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Name a tensor that does not fit: what the model has, what the file has (``float32 [10, 32]``)."""

    name: str
    model: str
    file: str


@dataclass(frozen=True, slots=True)
class LoadReport:
    """Say what of a model came out of a file; all names are clean names.

    ``matched`` got their values by name, ``tied`` through another name of the same tensor. ``defaulted`` are counters
    that the file is too old to have (``num_batches_tracked``), as torch itself allows. ``missing`` are names of the
    model without values, ``unexpected`` names of the file that the model lacks, ``mismatched`` are in both and do not
    fit. ``dropped`` are keys of the file that lie outside of the part that is the model, with the reason. ``casts``
    are matched names whose dtype the model changes. ``coverage`` is the share of the model's elements that got values,
    from 0 to 1, tied ones counted once. ``ignored`` are those of the missing, unexpected and mismatched that hold
    nothing learnt (index tables, masks, counters), where that was looked at; ``on_meta`` those tensors of the model
    that have no memory after loading. ``renamed`` are matched keys that carry other names in the file, where only the
    model tells its own: the file alone says otherwise.
    """

    source: Path
    state_dict: str
    certainty: Certainty
    matched: tuple[str, ...]
    tied: tuple[str, ...]
    defaulted: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    dropped: tuple[KeyMove, ...]
    casts: tuple[str, ...]
    coverage: float
    notes: tuple[Note, ...] = ()
    ignored: tuple[str, ...] = ()
    on_meta: tuple[str, ...] = ()
    renamed: tuple[KeyMove, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Tell whether model and file have the same tensors: what a strict load asks for."""
        return not (self.missing or self.unexpected or self.mismatched)
