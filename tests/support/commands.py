"""Run commands as a shell finds them: with ckptool on the path, out of the tree under test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command_environment(folder: Path) -> dict[str, str]:
    """Put ``ckptool`` and ``python`` into a folder at the head of the path, and the tree where Python finds it."""
    for name, arguments in (("ckptool", " -m ckptool"), ("python", ""), ("python3", "")):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}"{arguments} "$@"\n')
        command.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(paths)}


def ran(command: Sequence[object], environment: Mapping[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, everything captured."""
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300)
