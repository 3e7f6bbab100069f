"""The Typer application: one function a command, each imported with its options only."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ckptool import __version__
from ckptool.cli import Status
from ckptool.errors import CkptoolError

app = typer.Typer(
    name="ckptool",
    no_args_is_help=True,
    add_completion=False,
    # Plain help costs half of what rich's costs, and a pretty traceback would still be a bug.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ckptool {__version__}")
        raise typer.Exit


@app.callback()
def ckptool(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Inspect, diff, clean, convert and verify PyTorch checkpoints, without running what they contain.

    \b
    Exit status: 0 done, same, sound; 1 the answer is no; 2 could not answer.
    """


def command(name: str, example: str) -> Callable[[Callable[..., Status]], Callable[..., None]]:
    """Register a function that answers with a ``Status``, with one example under its help."""

    def register(function: Callable[..., Status]) -> Callable[..., None]:
        @app.command(name, epilog=f"Example:  {example}")
        @functools.wraps(function)
        def answer(*args: object, **kwargs: object) -> None:
            raise typer.Exit(_answer(function, args, kwargs))

        return answer

    return register


def _answer(function: Callable[..., Status], args: tuple[object, ...], kwargs: dict[str, object]) -> Status:
    try:
        status = function(*args, **kwargs)
        sys.stdout.flush()
    except CkptoolError as error:
        from ckptool.cli.terminal import complain

        complain(str(error))
        return Status.UNANSWERED
    except KeyboardInterrupt:
        typer.echo("ckptool: interrupted", err=True)
        return Status.INTERRUPTED
    return status


# Imported for their registration, after ``command`` exists.
from ckptool.cli import convert, inspect  # noqa: E402, F401
