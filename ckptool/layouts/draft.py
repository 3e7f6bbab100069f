"""A key plan in the making: what every key is called so far, what was dropped, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptool.layouts.segments import first_segments, shared_root, under
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
    _seen: tuple[dict[str, str], str | None, list[str]] | None = None

    @property
    def roots(self) -> list[str]:
        """List the distinct first segments of the names, in order of appearance."""
        return self._look()[2]

    @property
    def shared_root(self) -> str | None:
        """Give the first segment that every name lies below, or None."""
        return self._look()[1]

    def _look(self) -> tuple[dict[str, str], str | None, list[str]]:
        """Look through the names once for as long as they stay the same."""
        if self._seen is None or self._seen[0] is not self.names:
            shared = shared_root(self.names.values())
            roots = first_segments(self.names.values()) if shared is None else [shared]
            self._seen = (self.names, shared, roots)
        return self._seen

    def is_group(self, path: str) -> bool:
        """Tell whether a name lies below a path."""
        root = path.partition(".")[0]
        return root in self.roots and (path == self.shared_root or any(self.below(path)))

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

    def strip(self, path: str) -> None:
        """Take a path off the front of every name that is left; all of them lie below it."""
        start = len(path) + 1
        self.names = {source: name[start:] for source, name in self.names.items()}

    def outside(self, path: str) -> list[str]:
        """List the keys whose name does not lie below a path."""
        return [source for source, name in self.names.items() if not under(name, path)]

    def found(self, name: str, segment: str, count: int, certainty: Certainty) -> None:
        """Record a wrapper that was taken off ``count`` keys."""
        self.wrappers.append(Wrapper(name, segment, count, len(self.entries), certainty))
