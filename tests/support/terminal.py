"""Run a command with a terminal around it."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

ROOT = Path(__file__).parents[2]


def on_a_terminal(args: list[str], width: int, **variables: str) -> str:
    """Run ckptool with a pseudo-terminal for stdout and stderr and give what it wrote there."""
    own, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    environment |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "ckptool", *args]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment):
        os.close(theirs)
        written = bytearray()
        try:
            while chunk := os.read(own, 65536):
                written += chunk
        except OSError:  # what Linux says when the other side is closed
            pass
    os.close(own)
    return written.decode().replace("\r\n", "\n")
