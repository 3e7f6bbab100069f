"""A key plan in the making: what every key is called so far, what was dropped, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptool.layouts.segments import Names, under
from ckptool.model.plans import Certainty, KeyRule, Note, StateDict, Wrapper


@dataclass(slots=True)
class Draft:
    """Hold the names so far: source key to current name for what stays, source key to reason for what goes."""

    state_dict: StateDict
    container: str
    names: dict[str, str]
    dropped: dict[str, str] = field(default_factory=dict)
    wrappers: list[Wrapper] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    certainty: Certainty = "certain"
    is_ema: bool = False
    rule: KeyRule = field(default_factory=KeyRule)
    _listed: tuple[dict[str, str], Names] | None = None

    @property
    def listing(self) -> Names:
        """Give the names as they are now, to look through; the same one for as long as they stay the same."""
        if self._listed is None or self._listed[0] is not self.names:
            self._listed = (self.names, Names(self.names.values()))
        return self._listed[1]

    @property
    def roots(self) -> list[str]:
        """List the distinct first segments of the names, in order of appearance."""
        return self.listing.roots

    @property
    def shared_root(self) -> str | None:
        """Give the first segment that every name lies below, or None."""
        return self.listing.shared_root

    def is_group(self, path: str) -> bool:
        """Tell whether a name lies below a path."""
        return self.listing.any_below(path)

    def below(self, path: str) -> Iterator[str]:
        """Yield the keys whose name lies below a path."""
        front = f"{path}."
        return (source for source, name in self.names.items() if name.startswith(front))

    @property
    def entries(self) -> Mapping[str, Any]:
        """Give the values that the keys stand for."""
        return self.state_dict.entries

    def note(self, code: str, text: str) -> None:
        """Add one note."""
        self.notes.append(Note(code, text))

    def drop(self, sources: list[str], reason: str) -> None:
        """Drop keys, with the reason."""
        gone = dict.fromkeys(sources, reason)
        self.dropped |= gone
        self.names = {source: name for source, name in self.names.items() if source not in gone}

    def rename(self, listing: Names) -> None:
        """Give the keys that are left other names, in their order."""
        self.names = dict(zip(self.names, listing, strict=True))
        self._listed = (self.names, listing)

    def strip(self, path: str) -> None:
        """Take a path off the front of every name that is left; all of them lie below it."""
        self.rename(self.listing.cut(path))

    def outside(self, path: str) -> list[str]:
        """List the keys whose name does not lie below a path."""
        return [source for source, name in self.names.items() if not under(name, path)]

    def found(self, name: str, segment: str, count: int, certainty: Certainty) -> None:
        """Record a wrapper that was taken off ``count`` keys."""
        self.wrappers.append(Wrapper(name, segment, count, len(self.entries), certainty))
