"""What makes the answer of verify a no: the options, over the settings file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Optional

import typer

from ckptool.cli import Status, options
from ckptool.cli.settings import GATES, checks_named, find_settings, read_settings, threshold
from ckptool.model.gate import Gate, Settings
from ckptool.model.verification import CheckStatus, Thresholds, Verification

# Typer evaluates these on Python 3.10, too, where it wants Optional spelled out.
# ruff: noqa: UP045

GATED: dict[Gate, frozenset[CheckStatus]] = {
    "fail": frozenset(("fail",)),
    "warn": frozenset(("fail", "warn")),
    "never": frozenset(),
}


@dataclass(frozen=True, slots=True)
class GateOptions:
    """What counts, and how much."""

    checks: Annotated[
        Optional[list[str]],
        typer.Option(
            "--checks", help="Only these checks: values.finite, values, CK401, CK4 (repeatable).", metavar="ID"
        ),
    ] = None
    skip_checks: Annotated[
        Optional[list[str]], typer.Option("--skip-checks", help="Not these checks (repeatable).", metavar="ID")
    ] = None
    threshold: Annotated[
        Optional[list[str]],
        typer.Option(
            "--threshold",
            help=f"Set one of {', '.join(field.name for field in fields(Thresholds))} (repeatable).",
            metavar="NAME=X",
        ),
    ] = None
    fail_on: Annotated[
        Optional[str], typer.Option("--fail-on", help="Exit 1 on: fail (the default), warn or never.", metavar="STATUS")
    ] = None
    config: Annotated[
        Optional[Path],
        typer.Option("--config", help="Settings file, instead of the nearest ckptool.toml.", metavar="FILE"),
    ] = None


def settle(given: GateOptions) -> Settings:
    """Join the options with the settings file: what an option says replaces what the file says.

    :raises CkptoolError: either is not understood.
    """
    found = _nearest_settings() if given.config is None else read_settings(given.config)
    return replace(
        found,
        fail_on=found.fail_on if given.fail_on is None else options.one_of("--fail-on", given.fail_on, GATES),
        checks=checks_named("--checks", given.checks) if given.checks else found.checks,
        skip_checks=checks_named("--skip-checks", given.skip_checks) if given.skip_checks else found.skip_checks,
        thresholds={**found.thresholds, **_thresholds(given.threshold or ())},
    )


def _nearest_settings() -> Settings:
    try:
        start = Path.cwd()
    except OSError:  # the folder has been removed under our feet
        return Settings()
    return find_settings(start)


def _thresholds(texts: Iterable[str]) -> dict[str, float]:
    pairs = options.pairs("--threshold", texts)
    return {name: threshold("--threshold ", name, text) for name, text in pairs.items()}


def gate_of(settings: Settings) -> frozenset[CheckStatus]:
    """Give the statuses of a check that mean no."""
    return GATED[settings.fail_on or "fail"]


def status_of(answer: Verification, gate: frozenset[CheckStatus]) -> Status:
    """Give the exit status of one answer; ``gate`` holds the statuses of a check that mean no."""
    if answer.verdict in ("inconclusive", "error"):
        return Status.UNANSWERED
    return Status.NO if gate.intersection(check.status for check in answer.checks if not check.allowed) else Status.DONE
