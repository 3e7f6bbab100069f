"""What every test uses: the real entry point, run in-process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Ran:
    """Hold what one command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run ``ckptool ARG...`` through ``ckptool.cli.main`` and capture it."""

    def run_command(*args: object) -> Ran:
        from ckptool.cli import main

        capsys.readouterr()
        status = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return run_command
