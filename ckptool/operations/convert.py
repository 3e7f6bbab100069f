"""Write the chosen tensors of one checkpoint to a new file: plan, stage, read back, publish."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ckptool.errors import CkptoolError, OutputRefused, PlanRefused
from ckptool.formats import open_checkpoint
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.conversion import Conversion, ConvertOptions, OutputKind
from ckptool.model.plans import Note, PlannedTensor
from ckptool.model.results import CastLoss
from ckptool.model.sources import NoProgress, Progress
from ckptool.model.values import TensorSpec
from ckptool.operations.copying import PlannedCopy, plan_copy
from ckptool.operations.facts import NO_FACTS, facts_as_text
from ckptool.operations.opening import OpenedCheckpoint
from ckptool.operations.readback import check_staged
from ckptool.writers import WRITERS, staging

SUFFIXES: dict[str, OutputKind] = {
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
}
# What such a name promises is nothing that is written here.
_NEVER_WRITTEN = frozenset(
    {".npz", ".npy", ".pt2", ".ptl", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".nemo", ".onnx", ".gguf", ".h5"}
)
_NEVER_REPLACED = frozenset({"torch-tar", "torchscript", "torch-export", "pickle", "npy", "npz"})
_MAX_GROWTH = 4
_ALWAYS_ALLOWED_BYTES = 64 << 20


def kind_of_suffix(target: Path) -> OutputKind:
    """Tell from a file name what is to be written.

    :raises OutputRefused: the suffix stands for nothing that ckptool writes.
    """
    name = target.name.removesuffix(".tar") if target.name.endswith(".pth.tar") else target.name
    kind = SUFFIXES.get(Path(name).suffix.lower())
    if kind is None:
        raise OutputRefused(f"{target}: the suffix names no format; use .safetensors or .pt, or say --to")
    return kind


def kind_of_source(checkpoint: Checkpoint) -> OutputKind:
    """Give the container kind that keeps a checkpoint what it is (a stream of before torch 1.6 becomes a zip)."""
    return "safetensors" if checkpoint.is_safetensors else "torch"


def convert(
    source: Path,
    target: Path | None,
    options: ConvertOptions,
    kind: OutputKind | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write one checkpoint anew under clean keys; ``kind`` is that of the source where none is given.

    ``target`` may be None in a dry run. Nothing is published before it has been read back.

    :raises CkptoolError: what is meant is open, cannot be written faithfully, or the disk refuses.
    """
    _refuse_same_file(source, target, options)
    try:
        with open_checkpoint(source) as checkpoint:
            return _convert(checkpoint, target, options, kind, progress or NoProgress())
    except CkptoolError as error:
        # What is said of a tensor is said of a file: there may be many on the command line.
        if not any(str(path) in str(error) for path in (source, target)):
            error.args = (f"{source}: {error}",)
        raise


def _convert(
    checkpoint: Checkpoint, target: Path | None, options: ConvertOptions, kind: OutputKind | None, progress: Progress
) -> Conversion:
    opened = OpenedCheckpoint(checkpoint, options.weights, options.keys)
    kind = kind or kind_of_source(checkpoint)
    if options.in_place:
        _refuse_replacement(checkpoint)
    _refuse_kind(target, kind, options)
    carries_facts = kind == "safetensors" and options.metadata
    facts = facts_as_text(checkpoint, opened.selection) if carries_facts else NO_FACTS
    copy = plan_copy(checkpoint, opened.state_dict, opened.plan, options, kind, facts)
    _guard(checkpoint, copy, options)
    written: tuple[int, str | None] = copy.nbytes, None
    if not options.dry_run:
        assert target is not None
        written = _write(copy, target, kind, options, progress)
    return _tell(opened, copy, target, options, kind, written)


def _tell(
    opened: OpenedCheckpoint,
    copy: PlannedCopy,
    target: Path | None,
    options: ConvertOptions,
    kind: OutputKind,
    written: tuple[int, str | None],
) -> Conversion:
    checkpoint, plan = opened.checkpoint, opened.plan
    found = (Note(finding.code, finding.text) for finding in checkpoint.findings)
    return Conversion(
        source=checkpoint.path,
        target=target,
        kind=kind,
        dry_run=options.dry_run,
        state_dict=opened.state_dict.name,
        role=opened.state_dict.role,
        certainty=plan.certainty,
        wrappers=plan.wrappers,
        moves=plan.moves,
        tensors=len(copy.specs) + len(copy.opaque),
        dropped=copy.dropped,
        flattened=copy.flattened,
        ties=copy.ties,
        casts=tuple(tally.loss for tally in copy.tallies),
        notes=(*found, *opened.selection.notes, *plan.notes, *copy.notes),
        source_bytes=checkpoint.file_bytes,
        target_bytes=written[0],
        digest=written[1],
        made_dense=copy.made_dense,
    )


def _refuse_kind(target: Path | None, kind: OutputKind, options: ConvertOptions) -> None:
    if options.keep_rest and kind == "safetensors":
        raise OutputRefused(f"{target}: a safetensors file cannot keep the rest of a container; write a .pt file")
    if target is not None and target.suffix.lower() in _NEVER_WRITTEN:
        raise OutputRefused(f"{target}: ckptool writes .pt and .safetensors files only; name one, outside any archive")
    if target is not None and not options.in_place and SUFFIXES.get(target.suffix.lower(), kind) != kind:
        raise OutputRefused(f"{target}: the suffix does not stand for a {kind} file; name it otherwise, or use convert")


def _refuse_replacement(checkpoint: Checkpoint) -> None:
    """Refuse to put a file of torch.save in the place of something else, which may hold more than its tensors."""
    around = checkpoint.facts.get("inside")
    if around is not None or checkpoint.format in _NEVER_REPLACED:
        what = (
            f"lies inside another file ({around})"
            if around is not None
            else f"is no file of torch.save ({checkpoint.format})"
        )
        raise OutputRefused(f"{checkpoint.path}: what it holds {what}, and cannot be replaced in place; name OUT")


def _refuse_same_file(source: Path, target: Path | None, options: ConvertOptions) -> None:
    if target is None or options.in_place or not target.exists() or not source.exists():
        return
    if target.samefile(source):
        raise OutputRefused(f"{target}: is the input itself; to replace it, say --in-place")


def _guard(checkpoint: Checkpoint, copy: PlannedCopy, options: ConvertOptions) -> None:
    """Refuse what would surprise: nothing to write, an output many times the input, a rewrite in place that loses."""
    if not copy.specs and not copy.opaque:
        raise PlanRefused("no-weights", f"{checkpoint.path}: no tensor is left to write; see what --include asks for")
    planned = copy.nbytes
    held = max(checkpoint.file_bytes, sum(storage.nbytes for storage in checkpoint.storages))
    if planned > max(_MAX_GROWTH * held, _ALWAYS_ALLOWED_BYTES) and not options.force:
        raise OutputRefused(
            f"{checkpoint.path}: {checkpoint.file_bytes} bytes would become {planned} (expanded, overlapping or "
            "sparse tensors); add --force if that is meant"
        )
    if options.digest and copy.opaque:
        raise OutputRefused(
            f'{checkpoint.path}: the digest is of dense tensors, and "{next(iter(copy.opaque))}" is none; '
            "leave --digest out, or make it dense with --densify or --dequantize"
        )
    if options.in_place and copy.foreign and not options.weights_only:
        lost = ", ".join(drop.name for drop in copy.foreign[:3])
        raise OutputRefused(
            f"{checkpoint.path}: in place, {len(copy.foreign)} foreign object(s) would be lost ({lost}); keep their "
            "fields with --foreign fields, say --weights-only if that is meant, or write to another file"
        )


def _write(
    copy: PlannedCopy, target: Path, kind: OutputKind, options: ConvertOptions, progress: Progress
) -> tuple[int, str | None]:
    """Stage, read back and publish; give the size of the file and, where asked for, the digest of its tensors."""
    writer = WRITERS[kind]
    with staging(target, force=options.force or options.in_place, nbytes=writer.nbytes(copy.plan)) as staged:
        progress.start("writing", copy.payload_bytes)
        checksums = writer.write(copy.plan, staged.file, progress)
        staged.sync()
        if options.fail_on_overflow:
            _refuse_overflow(target, [tally.loss for tally in copy.tallies])
        progress.start("reading back", copy.payload_bytes)
        with open_checkpoint(staged.path) as written:
            found = check_staged(written, copy.plan, checksums, progress)
            digest = _digest(copy, found) if options.digest else None
            nbytes = written.file_bytes
        staged.publish()
    return nbytes, digest


def _digest(copy: PlannedCopy, found: Mapping[PlannedTensor, TensorSpec]) -> str:
    from ckptool.operations.digest import digest

    tensors = copy.plan.tensors
    specs = {name: found[tensors[copy.plan.aliases.get(name, name)]] for name in copy.specs}
    return digest(specs)


def _refuse_overflow(target: Path, losses: list[CastLoss]) -> None:
    overflowed = [loss for loss in losses if loss.overflowed or loss.saturated]
    if overflowed:
        first = overflowed[0]
        raise OutputRefused(
            f'{target}: not written, {len(overflowed)} tensor(s) overflow in {first.target}: "{first.key}" with '
            f"{first.overflowed + first.saturated} of {first.elements} values; choose a wider --dtype"
        )
