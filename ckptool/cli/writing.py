"""The commands that write: strip-prefixes and convert."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Optional

import typer

from ckptool import __version__
from ckptool.cli import Status, options
from ckptool.cli.app import command
from ckptool.cli.terminal import Terminal, canvas_of, complain, detect, remark, show
from ckptool.errors import CkptoolError, OutputRefused
from ckptool.formats.file import is_folder
from ckptool.model import dtypes
from ckptool.model.conversion import Conversion, ConvertOptions, OutputKind
from ckptool.model.places import RemotePath, as_path
from ckptool.model.sources import Progress

_KINDS: dict[str, OutputKind] = {"pt": "torch", "safetensors": "safetensors"}
_SUFFIXES: dict[OutputKind, str] = {"torch": ".pt", "safetensors": ".safetensors"}
_To = Annotated[
    Optional[str],  # noqa: UP045 - Typer evaluates it on Python 3.10, too
    typer.Option("--to", help="pt or safetensors; else the suffix of OUT decides.", metavar="FORMAT"),
]
_Average = Annotated[
    bool, typer.Option("--average", help="Write the mean of all IN to OUT (the last name, or -o OUT).")
]


@command("strip-prefixes", "Write a checkpoint under clean keys.", "ckptool strip-prefixes last.ckpt weights.pt")
def strip_prefixes(
    paths: options.InputsAndOutput,
    choice: options.ChoiceOptions,
    names: options.NameOptions,
    writing: options.WritingOptions,
    view: options.AnswerOptions,
) -> Status:
    """Write a checkpoint under clean keys, as the same kind of file.

    Removes what training wrapped around the model (torch.compile, DDP, FSDP, Lightning ...), by path segment and
    only on evidence; refuses where two answers are possible, and says which option settles it.
    """
    return _write_all(paths, _asked(choice, names, writing), writing, view)


@command("convert", "Write one clean .safetensors or .pt file.", "ckptool convert last.ckpt weights.safetensors")
def convert(
    paths: options.InputsAndOutput,
    choice: options.ChoiceOptions,
    names: options.NameOptions,
    writing: options.WritingOptions,
    view: options.AnswerOptions,
    to: _To = None,
    average: _Average = False,
) -> Status:
    """Write one clean .safetensors or .pt file.

    Keys are cleaned as strip-prefixes cleans them; --keep-prefixes leaves them. Training facts and hyperparameters
    go along as text in the metadata of a safetensors file.
    """
    kind = None if to is None else options.one_of("--to", to, _KINDS)
    asked = _asked(choice, names, writing)
    if average:
        paths, others, writing = _inputs_of_mean(paths, writing)
        asked = replace(asked, average_with=others)
    return _write_all(paths, asked, writing, view, kind, by_suffix=True)


def _inputs_of_mean(
    paths: list[str], writing: options.WritingOptions
) -> tuple[list[str], tuple[Path, ...], options.WritingOptions]:
    """Give the first input with OUT, and the other inputs; OUT is that of ``-o``, or else the last name."""
    if writing.manifest is not None:
        raise OutputRefused(f"--manifest {writing.manifest}: describes what one IN became; leave it out of --average")
    out = [str(writing.out_dir)] if writing.out_dir is not None else [] if writing.dry_run else paths[-1:]
    inputs = paths if writing.out_dir is not None or writing.dry_run else paths[:-1]
    if len(inputs) < 2:
        raise OutputRefused("--average: name two checkpoints or more, and OUT")
    return [inputs[0], *out], tuple(map(as_path, inputs[1:])), replace(writing, out_dir=None)


def _asked(
    choice: options.ChoiceOptions, names: options.NameOptions, writing: options.WritingOptions
) -> ConvertOptions:
    return ConvertOptions(
        weights=choice.weights,
        keys=options.key_options(choice, names),
        dtype=_dtype(writing.dtype),
        ties=options.one_of("--ties", writing.ties, {"keep": "keep", "copy": "copy"}),
        keep_rest=writing.keep_rest,
        foreign=options.one_of("--foreign", writing.foreign, {"drop": "drop", "fields": "fields"}),
        weights_only=writing.weights_only,
        metadata=writing.metadata,
        densify=writing.densify,
        dequantize=writing.dequantize,
        fail_on_overflow=writing.fail_on_overflow,
        digest=writing.digest,
        force=writing.force,
        in_place=writing.in_place,
        dry_run=writing.dry_run,
        max_shard_size=None
        if writing.max_shard_size is None
        else options.size_in_bytes("--max-shard-size", writing.max_shard_size),
    )


def _dtype(name: str | None) -> dtypes.DType | None:
    if name is None:
        return None
    dtype = dtypes.find(name.removeprefix("torch."))
    if dtype is None or not dtype.is_floating:
        known = ", ".join(name for name, dtype in dtypes.BY_NAME.items() if dtype.is_floating)
        raise CkptoolError(f"--dtype {name}: no floating dtype; choose one of {known}")
    return dtype


@dataclass(frozen=True, slots=True)
class _Task:
    """Name one file to read, the file to write (None in a dry run) and its kind (None: as the source)."""

    source: Path
    target: Path | None
    kind: OutputKind | None


def _write_all(
    names: list[str],
    asked: ConvertOptions,
    writing: options.WritingOptions,
    view: options.AnswerOptions,
    kind: OutputKind | None = None,
    *,
    by_suffix: bool = False,
) -> Status:
    from ckptool.reports.progress import ProgressBar

    terminal = detect(view.color, view.quiet)
    tasks = _tasks(names, writing, kind, by_suffix=by_suffix)
    _refuse_manifest(writing, tasks)
    with ProgressBar(quiet=view.quiet) as progress:
        results = [_write_one(task, asked, writing.manifest, progress) for task in tasks]
    done = [result for result in results if result is not None]
    _show(done, terminal, view, several=len(tasks) > 1)
    return Status.DONE if len(done) == len(results) else Status.UNANSWERED


def _refuse_manifest(writing: options.WritingOptions, tasks: list[_Task]) -> None:
    """Refuse before the work begins a manifest that would describe nothing, too much, or stand in a wrong place."""
    if writing.manifest is None:
        return
    from ckptool.cli.report_files import refuse_place

    if writing.dry_run:
        raise OutputRefused(
            f"--manifest {writing.manifest}: a dry run writes nothing to describe; leave one of them out"
        )
    if len(tasks) > 1:
        raise OutputRefused(f"--manifest {writing.manifest}: describes one OUT; convert the files one by one")
    refuse_place(writing.manifest, [path for task in tasks for path in (task.source, task.target) if path])


def _write_one(task: _Task, asked: ConvertOptions, manifest: Path | None, progress: Progress) -> Conversion | None:
    """Write one file; a refusal is said at once, and the next file has its turn."""
    from ckptool.operations.convert import convert as convert_one

    try:
        if manifest is not None:
            return _write_described(task, asked, manifest, progress)
        return convert_one(task.source, task.target, asked, task.kind, progress)
    except CkptoolError as error:
        complain(str(error))
        return None


def _write_described(task: _Task, asked: ConvertOptions, manifest: Path, progress: Progress) -> Conversion:
    """Write one file and its manifest; what hinders the manifest is found before anything is written."""
    from ckptool.operations.convert import convert as convert_one
    from ckptool.operations.manifest import describe, describe_files
    from ckptool.reports.manifest import write_manifest
    from ckptool.writers import staging

    with staging(manifest, force=asked.force) as staged:
        source = describe_files(task.source, progress)
        done = convert_one(task.source, task.target, asked, task.kind, progress)
        keeps_rest = asked.keep_rest or asked.in_place
        described = describe(_written(done), done.state_dict if keeps_rest and done.state_dict else "main", progress)
        staged.file.write(write_manifest(described, source, done, __version__).encode("ascii"))
        staged.publish()
    return done


def _written(done: Conversion) -> Path:
    """Give what the output is read from: of shards beside each other, their index."""
    assert done.target is not None
    return done.target.with_name(done.index_name) if done.index_name and not is_folder(done.target) else done.target


def _tasks(
    names: list[str], writing: options.WritingOptions, kind: OutputKind | None, *, by_suffix: bool
) -> list[_Task]:
    paths = [as_path(name) for name in names]
    _refuse_writing_elsewhere(paths, writing)
    if writing.in_place and writing.out_dir:
        raise OutputRefused("--in-place and --out-dir exclude each other; give one of them")
    if writing.in_place:
        return [_Task(path, path, kind) for path in paths]
    if writing.out_dir:
        return _tasks_into(writing.out_dir, paths, kind, by_suffix=by_suffix)
    if len(paths) == 1 and writing.dry_run:
        return [_Task(paths[0], None, kind)]
    if len(paths) != 2:
        raise OutputRefused("name IN and OUT; for more files use --out-dir DIR, to replace them --in-place")
    may_be_folder = _may_be_folder(paths[0], writing)
    if names[1].endswith(("/", "/.")) and not may_be_folder:
        raise OutputRefused(f"{names[1]}: names a folder; name a file in it, or use --out-dir")
    from ckptool.operations.convert import kind_of_target

    if by_suffix and kind is None:
        kind = kind_of_target(paths[1], may_be_folder=may_be_folder)
    return [_Task(paths[0], paths[1], kind)]


def _refuse_writing_elsewhere(paths: list[Path], writing: options.WritingOptions) -> None:
    """Refuse an output that is no path of this disk."""
    outputs = paths if writing.in_place else [] if writing.out_dir else paths[1:]
    for path in outputs:
        if isinstance(path, RemotePath):
            raise OutputRefused(f"{path}: ckptool writes to this disk only; name a file here for OUT")


def _may_be_folder(source: Path, writing: options.WritingOptions) -> bool:
    """Tell whether OUT may be a folder of files: they are asked for, or IN is one, or the index in one."""
    return writing.max_shard_size is not None or is_folder(source) or source.suffix == ".json"


def _tasks_into(folder: Path, paths: list[Path], kind: OutputKind | None, *, by_suffix: bool) -> list[_Task]:
    if by_suffix and kind is None:
        raise OutputRefused("--out-dir leaves the format open: say --to safetensors or --to pt")
    suffix = None if kind is None else _SUFFIXES[kind]
    tasks = [_Task(path, folder / _output_name(path, suffix), kind) for path in paths]
    targets = [task.target for task in tasks]
    for task in tasks:
        if targets.count(task.target) > 1:
            raise OutputRefused(f"{task.target}: two inputs would be written there; convert them one by one")
    if not is_folder(folder):
        _make(folder)
    return tasks


def _output_name(path: Path, suffix: str | None) -> str:
    """Name the output as its input is called; the suffix of a file makes way for another one, a folder has none."""
    if is_folder(path):
        return path.resolve().name + (suffix or "")
    name = path.name.partition(".index.")[0] if suffix and path.suffix == ".json" else path.name
    return name if suffix is None else Path(name).stem + suffix


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise OutputRefused(f"{folder}: cannot be made ({error.strerror}); choose another --out-dir") from error


def _show(done: list[Conversion], terminal: Terminal, view: options.AnswerOptions, *, several: bool) -> None:
    from ckptool.reports import conversion as report

    if view.json:
        from ckptool.reports.json import answer_json

        documents = [report.document(conversion) for conversion in done]
        if documents or several:
            show(answer_json(report.SCHEMA, documents, several=several))
        return
    for conversion in done:
        for note in conversion.notes:
            remark(note.text, terminal)
        if not view.quiet:
            show(report.view(conversion, canvas_of(terminal)) if terminal.is_terminal else report.plain(conversion))
