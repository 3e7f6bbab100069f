"""What verify is told of by a settings file: the checks, the numbers, and the findings that are accepted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Gate = Literal["fail", "warn", "never"]


@dataclass(frozen=True, slots=True)
class Allowance:
    """Accept what one check finds in one file, known by its SHA-256 (64 hexadecimal digits), for a ``reason``."""

    sha256: str
    check: str
    reason: str


@dataclass(frozen=True, slots=True)
class Settings:
    """Hold what a settings file says; what it does not say is None or empty.

    ``path`` is the file. ``checks`` and ``skip_checks`` are ids of checks, ``thresholds`` numbers by name.
    """

    path: Path | None = None
    fail_on: Gate | None = None
    checks: tuple[str, ...] = ()
    skip_checks: tuple[str, ...] = ()
    thresholds: Mapping[str, Any] = field(default_factory=dict)
    allow: tuple[Allowance, ...] = ()
