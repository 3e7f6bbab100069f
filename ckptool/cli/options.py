"""Every option, once: a name means the same thing in every command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Paths = Annotated[list[Path], typer.Argument(help="Checkpoint files.", show_default=False, metavar="PATH...")]

Weights = Annotated[
    str, typer.Option("--weights", help="State dict of the container: main, ema, raw, or its path.", metavar="WHICH")
]
Select = Annotated[
    Optional[str],  # noqa: UP045 - Typer evaluates this on Python 3.10, too
    typer.Option("--select", help="Keep only the keys under this prefix, without it.", metavar="PREFIX"),
]
Like = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--like", help="Reference names: a checkpoint, or a text file with one key a line.", metavar="FILE"),
]
Prefix = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--prefix", help="Strip exactly this prefix; every key must have it.", metavar="P"),
]
Keep = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--keep", help="Never strip this path segment (repeatable).", metavar="SEGMENT"),
]
KeepPrefixes = Annotated[bool, typer.Option("--keep-prefixes", help="Leave every key as it is.")]
Include = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--include", help="Only tensors whose clean name matches (repeatable).", metavar="GLOB"),
]
Exclude = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--exclude", help="No tensors whose clean name matches (repeatable).", metavar="GLOB"),
]
Map = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--map", help="JSON file of source to target names; null drops a key.", metavar="FILE"),
]
Rename = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--rename", help="Rewrite clean names, as in sed: s/pattern/replacement/ (repeatable).", metavar="S"),
]
AddPrefix = Annotated[str, typer.Option("--add-prefix", help="Put this before every clean name.", metavar="P")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes; the exit status says it.")]
Color = Annotated[str, typer.Option("--color", help="auto, always or never.", metavar="WHEN")]
