"""A key plan in the making: what every key is called so far, what was dropped, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptool.layouts.segments import under
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

    @property
    def entries(self) -> Mapping[str, Any]:
        """Give the values that the keys stand for."""
        return self.state_dict.entries

    def note(self, code: str, text: str) -> None:
        """Add one note."""
        self.notes.append(Note(code, text))

    def drop(self, sources: list[str], reason: str) -> None:
        """Drop keys, with the reason."""
        for source in sources:
            del self.names[source]
            self.dropped[source] = reason

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
