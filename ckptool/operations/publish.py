"""Write a planned copy: stage, read back, publish; one file, or several with their index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ckptool.errors import OutputRefused
from ckptool.formats import open_checkpoint
from ckptool.model.checkpoint import Shard
from ckptool.model.conversion import ConvertOptions, OutputKind
from ckptool.model.copies import Payload, PlannedTensor
from ckptool.model.sources import Progress
from ckptool.model.values import TensorSpec
from ckptool.operations.copying import PlannedCopy
from ckptool.operations.readback import check_index, check_staged
from ckptool.operations.sharding import PlannedShard, ShardedOutput, entry_names, homes_of, total_bytes
from ckptool.writers import WRITERS, StagedFolder, encode_index, staging, staging_folder, syncing


@dataclass(frozen=True, slots=True)
class Written:
    """Tell the size of all files in bytes, the digest of their tensors where asked for, and what several are called."""

    nbytes: int
    digest: str | None = None
    shards: tuple[Shard, ...] = ()
    index_name: str = ""


def write_file(
    copy: PlannedCopy, target: Path, kind: OutputKind, options: ConvertOptions, progress: Progress
) -> Written:
    """Write one file.

    :raises CkptoolError: it cannot be written, or is not what was meant when it is read again.
    """
    writer = WRITERS[kind]
    with staging(target, force=options.force or options.in_place, nbytes=writer.nbytes(copy.plan)) as staged:
        with syncing(staged.file):
            progress.start("writing", copy.payload_bytes)
            checksums = writer.write(copy.plan, staged.file, progress)
            staged.file.flush()
            _refuse_overflow(target, copy, options)
            progress.start("reading back", copy.payload_bytes)
            with open_checkpoint(staged.path) as written:
                found = check_staged(written, copy.plan, checksums, progress)
                digest = _digest(copy, found) if options.digest else None
                nbytes = written.file_bytes
        staged.publish()
    return Written(nbytes, digest)


def plan_shards(shards: Sequence[PlannedShard], output: ShardedOutput, kind: OutputKind) -> Written:
    """Say what files would be written, and how large."""
    sizes = [WRITERS[kind].nbytes(shard.plan) for shard in shards]
    planned = tuple(_shard(shard, nbytes) for shard, nbytes in zip(shards, sizes, strict=True))
    return Written(sum(sizes), None, planned, _index_name(shards, output))


def write_shards(
    copy: PlannedCopy,
    shards: Sequence[PlannedShard],
    output: ShardedOutput,
    kind: OutputKind,
    options: ConvertOptions,
    progress: Progress,
    replaced: Sequence[str],
) -> Written:
    """Write several files, and their index where there is more than one.

    ``replaced`` are the files in the folder that they replace.

    :raises CkptoolError: they cannot be written, or are not what was meant when they are read again.
    """
    index_name = _index_name(shards, output)
    nbytes = sum(WRITERS[kind].nbytes(shard.plan) for shard in shards)
    names = [shard.name for shard in shards]
    with staging_folder(output.folder, names, index_name, replaced=replaced, nbytes=nbytes) as staged:
        progress.start("writing", copy.payload_bytes)
        checksums = [_write_one(staged, shard, kind, progress) for shard in shards]
        index = encode_index(homes_of(shards, copy.plan), total_bytes(shards), copy.plan.aliases)
        if index_name:
            with staged.create(index_name) as file:
                file.write(index)
        _refuse_overflow(output.folder, copy, options)
        progress.start("reading back", copy.payload_bytes)
        found: dict[PlannedTensor, TensorSpec] = {}
        with ExitStack() as stack:
            parts = [stack.enter_context(open_checkpoint(staged.path / name)) for name in names]
            for shard, part, checksum in zip(shards, parts, checksums, strict=True):
                found |= check_staged(part, shard.plan, checksum, progress)
            if index_name:
                check_index(stack.enter_context(open_checkpoint(staged.path / index_name)))
            digest = _digest(copy, found) if options.digest else None
        staged.publish()
    return Written(
        sum(part.file_bytes for part in parts) + (len(index) if index_name else 0),
        digest,
        tuple(_shard(shard, part.file_bytes) for shard, part in zip(shards, parts, strict=True)),
        index_name,
    )


def _write_one(
    staged: StagedFolder, shard: PlannedShard, kind: OutputKind, progress: Progress
) -> Mapping[Payload, int]:
    with staged.create(shard.name) as file:
        return WRITERS[kind].write(shard.plan, file, progress)


def _index_name(shards: Sequence[PlannedShard], output: ShardedOutput) -> str:
    return output.names.index_name if len(shards) > 1 else ""


def _shard(shard: PlannedShard, nbytes: int) -> Shard:
    return Shard(shard.name, nbytes, tuple(entry_names(shard.plan)))


def _digest(copy: PlannedCopy, found: Mapping[PlannedTensor, TensorSpec]) -> str:
    from ckptool.operations.digest import digest

    tensors = copy.plan.tensors
    specs = {name: found[tensors[copy.plan.aliases.get(name, name)]] for name in copy.specs}
    return digest(specs)


def _refuse_overflow(target: Path, copy: PlannedCopy, options: ConvertOptions) -> None:
    losses = [tally.loss for tally in copy.tallies] if options.fail_on_overflow else []
    overflowed = [loss for loss in losses if loss.overflowed or loss.saturated]
    if overflowed:
        first = overflowed[0]
        raise OutputRefused(
            f'{target}: not written, {len(overflowed)} tensor(s) overflow in {first.target}: "{first.key}" with '
            f"{first.overflowed + first.saturated} of {first.elements} values; choose a wider --dtype"
        )
