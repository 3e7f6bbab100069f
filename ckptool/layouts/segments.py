"""The path segments that wrappers add to a key, who adds them, and how they are taken out again.

A key is a path: ``model._orig_mod.fc.weight``. Everything here works on whole segments, never on substrings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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


def private_segments(keys: Iterable[str], keep: Iterable[str] = ()) -> tuple[str, ...]:
    """List the private segments that occur in the keys, without the protected ones."""
    text = "\n".join(keys)
    kept = set(keep)
    return tuple(
        segment for segment in PRIVATE_SEGMENTS if kept.isdisjoint(segment.split(".")) and _may_occur(segment, text)
    )


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


def without_inner(key: str, segments: Sequence[str]) -> str:
    """Remove whole segments from a path, except its first and its last."""
    head, dot, tail = key.partition(".")
    return f"{head}.{without(tail, segments)}" if dot else key


def holds(key: str, segment: str) -> bool:
    """Tell whether ``without`` would remove the segment from this key."""
    return f".{segment}." in f".{key}"


def first_segments(names: Iterable[str]) -> list[str]:
    """List the distinct first segments, in order of appearance."""
    return list(dict.fromkeys([name.partition(".")[0] for name in names]))


def under(name: str, path: str) -> bool:
    """Tell whether a name lies below a path."""
    return name.startswith(f"{path}.")


def shared_root(names: Iterable[str]) -> str | None:
    """Give the first segment that every name lies below, or None."""
    heads = {name.partition(".")[0] if "." in name else "" for name in names}
    return heads.pop() or None if len(heads) == 1 else None


def quoted(names: Sequence[str], shown: int = 3) -> str:
    """List names for a message, the first few and how many more."""
    text = ", ".join(f'"{name}"' for name in names[:shown])
    return text if len(names) <= shown else f"{text} and {len(names) - shown} more"
