"""Every option, once: a name means the same thing in every command."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional, TypeVar

import typer

from ckptool.errors import CkptoolError
from ckptool.model.places import as_path
from ckptool.model.plans import KeyOptions

# Typer evaluates these on Python 3.10, too, where it wants Optional spelled out.
# ruff: noqa: UP045


def as_name(text: str) -> str:
    """Refuse a name that is empty, as a variable that is not set leaves it: as a path it is the current folder."""
    if not text:
        raise CkptoolError("the name of a file is empty; check the variable that it comes from")
    return text


def as_place(text: str) -> Path:
    """Read what a user calls a checkpoint."""
    return as_path(as_name(text))


def as_file(text: str) -> Path:
    """Read the name of a file or folder of this disk."""
    return Path(as_name(text))


Paths = Annotated[
    list[Path],
    typer.Argument(help="Checkpoint files.", show_default=False, metavar="[PATH]...", parser=as_place),
]
# As text: a path forgets the slash at its end, with which OUT would be a folder.
InputsAndOutput = Annotated[
    list[str],
    typer.Argument(
        help="IN and OUT: the checkpoint, then the file to write.",
        show_default=False,
        metavar="[PATH]...",
        parser=as_name,
    ),
]

# What is meant.
Weights = Annotated[
    str, typer.Option("--weights", help="State dict of the container: main, ema, raw, or its path.", metavar="WHICH")
]
Select = Annotated[
    Optional[str], typer.Option("--select", help="Keep only the keys under this prefix, without it.", metavar="PREFIX")
]
Like = Annotated[
    Optional[Path],
    typer.Option(
        "--like",
        help="Reference names: a checkpoint, a list (one key a line), or timm:NAME.",
        metavar="FILE",
        parser=as_place,
    ),
]
Prefix = Annotated[
    Optional[str], typer.Option("--prefix", help="Strip exactly this prefix; every key must have it.", metavar="P")
]
Keep = Annotated[
    Optional[list[str]],
    typer.Option("--keep", help="Never strip this path segment (repeatable).", metavar="SEGMENT"),
]
KeepPrefixes = Annotated[bool, typer.Option("--keep-prefixes", help="Leave every key as it is.")]
Include = Annotated[
    Optional[list[str]],
    typer.Option("--include", help="Only tensors whose clean name matches (repeatable).", metavar="GLOB"),
]
Exclude = Annotated[
    Optional[list[str]],
    typer.Option("--exclude", help="No tensors whose clean name matches (repeatable).", metavar="GLOB"),
]
Map = Annotated[
    Optional[Path],
    typer.Option("--map", help="JSON file of source to target names; null drops a key.", metavar="FILE"),
]
Rename = Annotated[
    Optional[list[str]],
    typer.Option("--rename", help="Rewrite clean names as sed would: s/a/b/ (repeatable).", metavar="S"),
]
AddPrefix = Annotated[str, typer.Option("--add-prefix", help="Put this before every clean name.", metavar="P")]

# What is written.
OutDir = Annotated[
    Optional[Path],
    typer.Option("--out-dir", "-o", help="Write here; every PATH is an input then.", metavar="DIR", parser=as_file),
]
Dtype = Annotated[
    Optional[str], typer.Option("--dtype", help="Cast floating tensors: float16, bfloat16 ...", metavar="DTYPE")
]
Densify = Annotated[bool, typer.Option("--densify", help="Write sparse tensors as dense ones.")]
Dequantize = Annotated[bool, typer.Option("--dequantize", help="Write quantized tensors as float32 ones.")]
FailOnOverflow = Annotated[
    bool, typer.Option("--fail-on-overflow", help="Write nothing if a cast takes a value out of range.")
]
Ties = Annotated[
    str,
    typer.Option("--ties", help="keep: tied tensors are written once; copy: under every name.", metavar="HOW"),
]
MaxShardSize = Annotated[
    Optional[str],
    typer.Option("--max-shard-size", help="Split OUT into files of at most this size: 5GB, 500MiB ...", metavar="SIZE"),
]
KeepRest = Annotated[
    bool, typer.Option("--keep-rest", help="Keep epoch, optimizer and the rest around the weights (.pt).")
]
Foreign = Annotated[
    str,
    typer.Option("--foreign", help="Objects of foreign classes: drop them, or keep their fields.", metavar="HOW"),
]
WeightsOnly = Annotated[bool, typer.Option("--weights-only", help="With --in-place: foreign objects may go.")]
Metadata = Annotated[
    bool, typer.Option("--metadata/--no-metadata", help="Carry training facts over as text (safetensors).")
]
Digest = Annotated[bool, typer.Option("--digest", help="Say the digest of the written tensors.")]
Manifest = Annotated[
    Optional[Path],
    typer.Option("--manifest", help="Describe OUT in a JSON file, for verify --manifest.", metavar="FILE"),
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace OUT if it exists.")]
InPlace = Annotated[bool, typer.Option("--in-place", help="Replace IN itself, the rest kept.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]

# How the answer looks.
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no summary; the exit status says it.")]
Color = Annotated[str, typer.Option("--color", help="auto, always or never.", metavar="WHEN")]


@dataclass(frozen=True, slots=True)
class ChoiceOptions:
    """Which tensors are meant."""

    weights: Weights = "main"
    select: Select = None
    like: Like = None
    include: Include = None
    exclude: Exclude = None


@dataclass(frozen=True, slots=True)
class NameOptions:
    """What their names become."""

    prefix: Prefix = None
    keep: Keep = None
    keep_prefixes: KeepPrefixes = False
    map_file: Map = None
    rename: Rename = None
    add_prefix: AddPrefix = ""


@dataclass(frozen=True, slots=True)
class WritingOptions:
    """What is written, and where."""

    out_dir: OutDir = None
    dtype: Dtype = None
    densify: Densify = False
    dequantize: Dequantize = False
    fail_on_overflow: FailOnOverflow = False
    ties: Ties = "keep"
    max_shard_size: MaxShardSize = None
    keep_rest: KeepRest = False
    foreign: Foreign = "drop"
    weights_only: WeightsOnly = False
    metadata: Metadata = True
    digest: Digest = False
    manifest: Manifest = None
    force: Force = False
    in_place: InPlace = False
    dry_run: DryRun = False


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How the answer looks."""

    json: Json = False
    quiet: Quiet = False
    color: Color = "auto"


_Choice = TypeVar("_Choice")


def one_of(option: str, text: str, choices: Mapping[str, _Choice]) -> _Choice:
    """Read an option that takes one of a few words.

    :raises CkptoolError: it is another word.
    """
    if text not in choices:
        raise CkptoolError(f"{option} {text}: choose one of {', '.join(choices)}")
    return choices[text]


def pairs(option: str, texts: Iterable[str] | None) -> dict[str, str]:
    """Read an option that is repeated as ``name=value``.

    :raises CkptoolError: one of them is not.
    """
    found = {}
    for text in texts or ():
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise CkptoolError(f"{option} {text}: write it as name=value")
        found[name] = value
    return found


# Decimal as the Hub counts, binary as memory is counted.
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
_SIZE = re.compile(r"(\d{1,18})(?:\.(\d{1,9}))?\s*([a-z]*)", re.ASCII | re.IGNORECASE)


def size_in_bytes(option: str, text: str) -> int:
    """Read a size: a number of bytes, or one with a unit (``5GB`` is 5 * 10**9, ``5GiB`` 5 * 2**30).

    :raises CkptoolError: it is no size, or none of at least one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    whole, part, unit = match.groups("") if match else ("0", "", "")
    scale: int = 10 ** len(part)
    nbytes = int(whole + part) * _UNITS.get(unit.upper(), 0) // scale
    if nbytes < 1:
        raise CkptoolError(f"{option} {text}: no size; give bytes, or a number with KB, MB, GB, KiB, MiB or GiB")
    return nbytes


def key_options(choice: ChoiceOptions, names: NameOptions | None = None) -> KeyOptions:
    """Gather what was asked of the keys, with the files that were named read in.

    :raises CkptoolError: a reference, a map or a substitution cannot be read.
    """
    from ckptool.operations import references

    names = names or NameOptions()
    return KeyOptions(
        reference=None if choice.like is None else references.read_reference(choice.like),
        select=choice.select,
        prefix=names.prefix,
        keep=tuple(names.keep or ()),
        keep_prefixes=names.keep_prefixes,
        include=tuple(choice.include or ()),
        exclude=tuple(choice.exclude or ()),
        mapping=None if names.map_file is None else references.read_map(names.map_file),
        rename=tuple(references.read_rename(text) for text in names.rename or ()),
        add_prefix=names.add_prefix,
    )
