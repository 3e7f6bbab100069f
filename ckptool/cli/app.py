"""The Typer application: one function a command, each imported with its options only."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Optional, get_type_hints

import typer

from ckptool import __version__
from ckptool.cli import Status

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


def _print_completion(shell: str | None) -> None:
    if shell is None:
        return
    from ckptool.cli.completion import SHELLS, write_completion

    if shell not in SHELLS:
        raise typer.BadParameter(f"choose one of {', '.join(SHELLS)}")
    typer.echo(write_completion(shell), nl=False)
    raise typer.Exit


@app.callback()
def describe_program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    show_completion: Annotated[
        Optional[str],  # noqa: UP045 - Typer evaluates it on Python 3.10, too
        typer.Option(
            "--show-completion",
            help="Print the completion script for bash, zsh or fish.",
            metavar="SHELL",
            callback=_print_completion,
            is_eager=True,
        ),
    ] = None,
) -> None:
    """Inspect, diff, clean, convert and verify PyTorch checkpoints, without running what they contain.

    \b
    Exit status: 0 done, same, sound; 1 the answer is no; 2 could not answer.
    """


def command(name: str, summary: str, example: str) -> Callable[[Callable[..., Status]], Callable[..., Status]]:
    """Register a function that answers with a ``Status``; one line sums it up, one example stands under its help.

    A parameter that is a dataclass of options stands for all of its fields.
    """

    def register(function: Callable[..., Status]) -> Callable[..., Status]:
        defaults = inspect.signature(function).parameters
        hints = get_type_hints(function, include_extras=True)
        del hints["return"]
        groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

        def answer(**kwargs: Any) -> None:
            for group_name, group in groups.items():
                kwargs[group_name] = group(**{field.name: kwargs.pop(field.name) for field in fields(group)})
            raise typer.Exit(_answer(function, kwargs))

        answer.__doc__ = function.__doc__
        # Typer reads the options of a command off its signature.
        answer.__signature__ = inspect.Signature(_parameters(hints, defaults))  # type: ignore[attr-defined]
        app.command(name, short_help=summary, epilog=f"Example:  {example}")(answer)
        return function

    return register


def _parameters(hints: Mapping[str, Any], own: Mapping[str, inspect.Parameter]) -> list[inspect.Parameter]:
    parameters = []
    for name, hint in hints.items():
        if is_dataclass(hint):
            below = get_type_hints(hint, include_extras=True)
            parameters += [_parameter(field.name, below[field.name], field.default) for field in fields(hint)]
        else:
            parameters.append(_parameter(name, hint, own[name].default))
    return parameters


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _answer(function: Callable[..., Status], kwargs: Mapping[str, Any]) -> Status:
    try:
        status = function(**kwargs)
        sys.stdout.flush()
    except KeyboardInterrupt:
        typer.echo("ckptool: interrupted", err=True)
        return Status.INTERRUPTED
    return status
