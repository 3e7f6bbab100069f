"""The path segments that wrappers add to a key, who adds them, and how they are taken out again.

A key is a path: ``model._orig_mod.fc.weight``. Everything here works on whole segments, never on substrings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import translate
from functools import cached_property

# Private names of a framework, removed at any depth. The pair stands last: it may only meet once the others are gone.
# Sources: torch/_dynamo/eval_frame.py, torch/distributed/fsdp/_common_utils.py, torch/distributed/algorithms/
# _checkpoint/checkpoint_wrapper.py, lightning/fabric/wrappers.py, torchrec DistributedModelParallel, ORTModule.
PRIVATE_SEGMENTS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_fpw_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
    "_original_module": "Lightning Fabric",
    "_dmp_wrapped_module": "TorchRec",
    "_flattened_output_module._base_module": "ORTModule",
}

# What FSDP calls the one tensor that all parameters of a unit were flattened into.
FLAT_LEAVES = frozenset({"_flat_param", "flat_param"})


def removable_segments(keep: Iterable[str]) -> tuple[str, ...]:
    """List the private segments that no ``--keep`` protects."""
    kept = set(keep)
    return tuple(segment for segment in PRIVATE_SEGMENTS if kept.isdisjoint(segment.split(".")))


class Names(tuple[str, ...]):
    """Hold names that are looked through together: as one text, which is far faster than one after the other."""

    @cached_property
    def text(self) -> str:
        """Join the names, each between two line breaks."""
        return "\n".join(["", *self, ""])

    @cached_property
    def is_lined(self) -> bool:
        """Tell whether no name has a line break of its own."""
        return self.text.count("\n") == len(self) + 1

    def any_below(self, path: str) -> bool:
        """Tell whether a name lies below a path."""
        return f"\n{path}." in self.text and (self.is_lined or any(under(name, path) for name in self))

    def all_below(self, path: str) -> bool:
        """Tell whether every name lies below a path."""
        if self.is_lined:
            return self.text.count(f"\n{path}.") == len(self)
        return all(under(name, path) for name in self)

    @classmethod
    def of_text(cls, text: str) -> Names:
        """Read the names, at least one, out of what ``text`` gives."""
        names = cls(text[1:-1].split("\n"))
        names.__dict__["text"] = text
        return names

    def cut(self, path: str) -> Names:
        """Take a path off the front of every name; all of them lie below it."""
        if self.is_lined and self:
            return Names.of_text(self.text.replace(f"\n{path}.", "\n"))
        return Names(name[len(path) + 1 :] for name in self)

    def without(self, segments: Sequence[str]) -> Names:
        """Remove whole segments from every name; the last one of a name is never removed."""
        if not self.is_lined or not self:
            return Names(without(name, segments) for name in self)
        text = self.text
        for segment in segments:
            front, run = f"\n{segment}.", f".{segment}."
            while front in text or run in text:
                text = text.replace(front, "\n").replace(run, ".")
        return Names.of_text(text)

    @cached_property
    def shared_root(self) -> str | None:
        """Give the first segment that every name lies below, or None."""
        head, dot, _ = next(iter(self), "").partition(".")
        return head if dot and self.all_below(head) else None

    @cached_property
    def roots(self) -> list[str]:
        """List the distinct first segments, in order of appearance."""
        return [self.shared_root] if self.shared_root is not None else first_segments(self)

    def private_segments(self, keep: Iterable[str] = ()) -> tuple[str, ...]:
        """List the private segments that occur in the names (or seem to), without the protected ones."""
        return tuple(segment for segment in removable_segments(keep) if self._may_hold(segment))

    def _may_hold(self, segment: str) -> bool:
        return all(part in self.text for part in segment.split("."))

    def count_holding(self, segment: str) -> int:
        """Count the names that ``without`` would remove the segment from."""
        if segment not in self.text:  # where most segments end
            return 0
        front, inner = f"{segment}.", f".{segment}."
        return sum([name.startswith(front) or inner in name for name in self])


def without(key: str, segments: Sequence[str]) -> str:
    """Remove whole segments from a path; its last segment is never removed."""
    text = f".{key}"
    for segment in segments:
        run = f".{segment}."
        while run in text:
            text = text.replace(run, ".")
    return text[1:]


def without_inner(key: str, segments: Sequence[str]) -> str:
    """Remove whole segments from a path, except its first and its last."""
    head, dot, tail = key.partition(".")
    return f"{head}.{without(tail, segments)}" if dot else key


def first_segments(names: Iterable[str]) -> list[str]:
    """List the distinct first segments, in order of appearance."""
    return list(dict.fromkeys([name.partition(".")[0] for name in names]))


def under(name: str, path: str) -> bool:
    """Tell whether a name lies below a path."""
    return name.startswith(f"{path}.")


def any_glob(globs: Iterable[str]) -> Callable[[str], object]:
    """Match names that one of the globs fits; without a glob, none."""
    return re.compile("|".join(map(translate, globs)) or r"(?!)").match  # which matches nothing


def wanted_by(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """Tell whether a name is left by globs for what is in, without which everything is, and for what is out."""
    included, excluded = any_glob(include or ("*",)), any_glob(exclude)
    return lambda name: bool(included(name)) and not excluded(name)


def quoted(names: Sequence[str], shown: int = 3) -> str:
    """List names for a message, the first few and how many more."""
    text = ", ".join(f'"{name}"' for name in names[:shown])
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more"
