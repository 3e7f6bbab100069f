"""The path segments that wrappers add to a key, who adds them, and how they are taken out again.

A key is a path: ``model._orig_mod.fc.weight``. Everything here works on whole segments, never on substrings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

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


def private_segments(keys: Iterable[str], keep: Iterable[str] = ()) -> tuple[str, ...]:
    """List the private segments that occur in the keys (or seem to), without the protected ones."""
    text = "\n".join(keys)
    return tuple(segment for segment in removable_segments(keep) if _may_occur(segment, text))


def _may_occur(segment: str, text: str) -> bool:
    return all(part in text for part in segment.split("."))


def without(key: str, segments: Sequence[str]) -> str:
    """Remove whole segments from a path; its last segment is never removed."""
    text = f".{key}"
    for segment in segments:
        run = f".{segment}."
        while run in text:
            text = text.replace(run, ".")
    return text[1:]


def without_all(names: Mapping[str, str], segments: Sequence[str]) -> dict[str, str]:
    """Remove whole segments from every value, as ``without`` does: in one text, which is far faster than in many."""
    text = "." + "\n.".join(names.values())
    if text.count("\n") >= len(names):  # a name with a line break of its own
        return {source: without(name, segments) for source, name in names.items()}
    for segment in segments:
        run = f".{segment}."
        while run in text:
            text = text.replace(run, ".")
    return dict(zip(names, text[1:].split("\n."), strict=True))


def without_inner(key: str, segments: Sequence[str]) -> str:
    """Remove whole segments from a path, except its first and its last."""
    head, dot, tail = key.partition(".")
    return f"{head}.{without(tail, segments)}" if dot else key


def count_holding(keys: Iterable[str], segment: str) -> int:
    """Count the keys that ``without`` would remove the segment from."""
    keys = list(keys)
    if segment not in "\n".join(keys):  # one look at one text, where most segments end
        return 0
    front, inner = f"{segment}.", f".{segment}."
    return sum([key.startswith(front) or inner in key for key in keys])


def first_segments(names: Iterable[str]) -> list[str]:
    """List the distinct first segments, in order of appearance."""
    return list(dict.fromkeys([name.partition(".")[0] for name in names]))


def under(name: str, path: str) -> bool:
    """Tell whether a name lies below a path."""
    return name.startswith(f"{path}.")


def shared_root(names: Collection[str]) -> str | None:
    """Give the first segment that every name lies below, or None."""
    head, dot, _ = next(iter(names), "").partition(".")
    return head if dot and all_under(names, head) else None


def all_under(names: Collection[str], path: str) -> bool:
    """Tell whether every name lies below a path: what the first and last in order share, all between them share."""
    return under(min(names), path) and under(max(names), path)


def quoted(names: Sequence[str], shown: int = 3) -> str:
    """List names for a message, the first few and how many more."""
    text = ", ".join(f'"{name}"' for name in names[:shown])
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more"
