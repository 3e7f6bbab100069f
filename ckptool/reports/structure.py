"""How a network is built, in a few words."""

from __future__ import annotations

from collections.abc import Iterator

from ckptool.model.inspection import Structure
from ckptool.reports.text import plural, shape_text

_MAX_STAGES = 12


def structure_phrases(structure: Structure) -> Iterator[str]:
    """Say what is known, a phrase each: ``Bottleneck [3, 4, 6, 3]``, ``width 768`` ..."""
    if structure.kind is not None or structure.stages:
        yield f"{structure.kind or 'blocks'} {_counts(structure)}"
    numbers = (("width", structure.width), ("heads", structure.heads), ("context", structure.context))
    yield from (f"{name} {number:,}" for name, number in numbers if number is not None)
    if structure.patch_size is not None:
        yield f"patches of {shape_text(structure.patch_size)}"
    if structure.grid is not None:
        yield f"grid of {structure.grid}x{structure.grid}"
    if structure.lora_rank is not None:
        yield f"LoRA rank {structure.lora_rank}"


def _counts(structure: Structure) -> str:
    if not structure.stages:
        return f"of {plural(structure.depth or 0, 'layer')}"
    counts = [str(stage.blocks) for stage in structure.stages]
    rest = f", {len(counts) - _MAX_STAGES} more" if len(counts) > _MAX_STAGES else ""
    return f"[{', '.join(counts[:_MAX_STAGES])}{rest}]"
