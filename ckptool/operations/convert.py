"""Write the chosen tensors of one checkpoint to a new file: plan, stage, read back, publish."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ckptool.errors import CkptoolError, OutputRefused, PlanRefused
from ckptool.formats import open_checkpoint
from ckptool.formats.file import listing
from ckptool.formats.shards import INDEX_NAME
from ckptool.model.checkpoint import Checkpoint
from ckptool.model.conversion import OUTPUT_SUFFIXES, Conversion, ConvertOptions, OutputKind
from ckptool.model.places import is_same_file
from ckptool.model.plans import Note
from ckptool.model.sources import NoProgress, Progress
from ckptool.model.values import OpaqueTensor
from ckptool.operations.average import average
from ckptool.operations.copying import Change, PlannedCopy, Specs, plan_copy
from ckptool.operations.facts import NO_FACTS, facts_as_text
from ckptool.operations.opening import OpenedCheckpoint, open_path
from ckptool.operations.publish import Written, plan_shards, write_file, write_shards
from ckptool.operations.sharding import ShardedOutput, file_names, folder_of, sharded_output, split

# What such a name promises is nothing that is written here.
_NEVER_WRITTEN = frozenset(
    {".npz", ".npy", ".pt2", ".ptl", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".nemo", ".onnx", ".gguf", ".h5"}
)
_NEVER_REPLACED = frozenset(
    {"torch-tar", "torchscript", "torch-export", "pickle", "npy", "npz", "torch-distributed", "deepspeed-zero"}
)
# What lies beside the weights of a model and belongs to it: its configuration and its tokenizer.
_SETTINGS = (".json", ".txt", ".model", ".jinja")
_MAX_GROWTH = 4
_MAX_NAMED = 3
_ALWAYS_ALLOWED_BYTES = 64 << 20


def kind_of_target(target: Path, *, may_be_folder: bool = False) -> OutputKind:
    """Tell from the name of an output what is to be written; ``may_be_folder`` tells that it may be that of a folder.

    :raises OutputRefused: the suffix stands for nothing that ckptool writes.
    """
    name = target.name.removesuffix(".tar") if target.name.endswith(".pth.tar") else target.name
    index = INDEX_NAME.fullmatch(name)
    kind = OUTPUT_SUFFIXES.get(f".{index['suffix']}" if index else Path(name).suffix.lower())
    if kind is None and may_be_folder:
        return "safetensors"  # as the Hub's tools write unless they are told otherwise
    if kind is None:
        raise OutputRefused(f"{target}: the suffix names no format; use .safetensors or .pt, or say --to")
    return kind


def _kind_of_source(checkpoint: Checkpoint) -> OutputKind:
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
    try:
        with ExitStack() as stack:
            checkpoint = stack.enter_context(open_checkpoint(source))
            others = [stack.enter_context(open_path(path)) for path in options.average_with]
            return _convert(checkpoint, others, source, target, options, kind, progress or NoProgress())
    except CkptoolError as error:
        # What is said of a tensor is said of a file: there may be many on the command line.
        if not any(str(path) in str(error) for path in (source, target)):
            error.args = (f"{source}: {error}",)
        raise


def _convert(
    checkpoint: Checkpoint,
    others: Sequence[OpenedCheckpoint],
    source: Path,
    target: Path | None,
    options: ConvertOptions,
    kind: OutputKind | None,
    progress: Progress,
) -> Conversion:
    opened = OpenedCheckpoint(checkpoint, options.weights, options.keys)
    kind = kind or _kind_of_source(checkpoint)
    if options.in_place:
        _refuse_replacement(checkpoint, kind)
    target = checkpoint.path if options.in_place else target
    output = sharded_output(checkpoint, source, target, kind, options)
    _refuse_kind(target, output, kind, options)
    replaced = _replaced(checkpoint, target, output, options)
    carries_facts = kind == "safetensors" and options.metadata
    # No training came to the mean: the facts are those of one of its terms.
    facts = facts_as_text(checkpoint, opened.selection) if carries_facts and not others else NO_FACTS
    change = _averaging(opened, others, options) if others else None
    copy = plan_copy(checkpoint, opened.state_dict, opened.plan, options, kind, facts, change)
    _guard(checkpoint, copy, options)
    shards = split(copy.plan, output, checkpoint, opened.plan) if output else ()
    if options.dry_run:
        planned = plan_shards(shards, output, kind) if output else Written(0)
        written = replace(planned, nbytes=copy.nbytes)
    elif output:
        written = write_shards(copy, shards, output, kind, options, progress, replaced)
    else:
        assert target is not None
        written = write_file(copy, target, kind, options, progress)
    return _tell(opened, copy, target, options, kind, written, tuple(_left_behind(checkpoint, output, options)))


def _averaging(first: OpenedCheckpoint, others: Sequence[OpenedCheckpoint], options: ConvertOptions) -> Change:
    if options.keep_rest or options.in_place:
        raise OutputRefused(f"{first.checkpoint.path}: a mean has no container to keep; name OUT, without --keep-rest")
    named = [OpenedCheckpoint(other.checkpoint, options.weights, options.keys) for other in others]

    def change(specs: Specs, opaque: Mapping[str, OpaqueTensor]) -> tuple[Specs, tuple[Note, ...]]:
        averaged = average(first, specs, opaque, named, options.dtype)
        return averaged.specs, averaged.notes

    return change


def _tell(
    opened: OpenedCheckpoint,
    copy: PlannedCopy,
    target: Path | None,
    options: ConvertOptions,
    kind: OutputKind,
    written: Written,
    left_behind: tuple[Note, ...],
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
        notes=(*found, *opened.selection.notes, *plan.notes, *copy.notes, *left_behind),
        source_bytes=checkpoint.file_bytes,
        target_bytes=written.nbytes,
        digest=written.digest,
        made_dense=copy.made_dense,
        shards=written.shards,
        index_name=written.index_name,
        averaged=options.average_with,
    )


def _refuse_kind(target: Path | None, output: ShardedOutput | None, kind: OutputKind, options: ConvertOptions) -> None:
    if options.keep_rest and kind == "safetensors":
        raise OutputRefused(f"{target}: a safetensors file cannot keep the rest of a container; write a .pt file")
    if target is not None and target.suffix.lower() in _NEVER_WRITTEN:
        raise OutputRefused(f"{target}: ckptool writes .pt and .safetensors files only; name one, outside any archive")
    suffix = output.names.suffix if output else target.suffix if target else ""
    if not options.in_place and OUTPUT_SUFFIXES.get(suffix.lower(), kind) != kind:
        raise OutputRefused(
            f"{target}: the suffix does not stand for a {kind} file; name it otherwise, or write another kind with "
            "convert --to"
        )


def _refuse_replacement(checkpoint: Checkpoint, kind: OutputKind) -> None:
    """Refuse to put a file of another kind in the place of one, which may hold more than its tensors."""
    if kind != _kind_of_source(checkpoint):
        raise OutputRefused(f"{checkpoint.path}: in place it stays what it is, no {kind} file; name OUT, or leave --to")
    around = checkpoint.facts.get("inside")
    if around is None and checkpoint.format not in _NEVER_REPLACED:
        return
    what = f"lies inside another file ({around})" if around else f"is no file of torch.save ({checkpoint.format})"
    raise OutputRefused(f"{checkpoint.path}: what it holds {what}, and cannot be replaced in place; name OUT")


def _replaced(
    checkpoint: Checkpoint, target: Path | None, output: ShardedOutput | None, options: ConvertOptions
) -> list[str]:
    """List the files in the folder of the output that it replaces.

    :raises OutputRefused: they are the input, or there are any, and nothing was said of replacing them.
    """
    taken = output.names.taken(output.folder) if output else []
    own = [folder_of(checkpoint) / name for name in file_names(checkpoint)]
    if options.in_place:
        return sorted({*taken, *(path.name for path in own)})
    outputs = [output.folder / name for name in taken] if output else [] if target is None else [target]
    for path in outputs:
        if any(is_same_file(path, other) for other in (*own, *options.average_with)):
            raise OutputRefused(f"{path}: is the input itself; to replace it, say --in-place")
    if taken and not options.force and not options.dry_run:
        raise OutputRefused(f"{outputs[0]}: exists already; add --force to replace it")
    return taken


def _left_behind(checkpoint: Checkpoint, output: ShardedOutput | None, options: ConvertOptions) -> Iterator[Note]:
    """Say what else lies in the folder of a model, and is not copied to the folder that is written."""
    folder = folder_of(checkpoint)
    if output is None or options.in_place or is_same_file(output.folder, folder):
        return
    names = listing(folder)
    own = file_names(checkpoint)
    beside = [name for name in names if name not in own and name.endswith(_SETTINGS) and not name.startswith(".")]
    if not checkpoint.shards and "config.json" not in names:
        return
    if beside:
        more = f" and {len(beside) - _MAX_NAMED} more files" if len(beside) > _MAX_NAMED else ""
        yield Note("not-copied", f"not copied from beside the weights: {', '.join(beside[:_MAX_NAMED])}{more}")


def _guard(checkpoint: Checkpoint, copy: PlannedCopy, options: ConvertOptions) -> None:
    """Refuse what would surprise: nothing to write, an output many times the input, a rewrite in place that loses."""
    if not copy.specs and not copy.opaque:
        reason = "no tensor is left to write; see what --include, --exclude and --map ask for"
        raise PlanRefused("no-weights", f"{checkpoint.path}: {reason}")
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
    foreign = (*copy.module, *copy.foreign)
    if options.in_place and foreign and not options.weights_only:
        lost = ", ".join(drop.name for drop in foreign[:3])
        fields = "keep their fields with --foreign fields, " if copy.foreign and options.foreign == "drop" else ""
        raise OutputRefused(
            f"{checkpoint.path}: in place, {len(foreign)} foreign object(s) would be lost ({lost}); {fields}"
            "say --weights-only if that is meant, or write to another file"
        )
