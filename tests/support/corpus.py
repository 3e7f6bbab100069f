"""Run commands over many files in one process that may take a gibibyte of memory, all told, and do nothing but read.

Run as a program: standard input names the files as JSON, standard output answers with one row for each command.
"""

from __future__ import annotations

import io
import json
import resource
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from support.containment import NBYTES, SECONDS, WATCH, limited_time


def run(arguments: list[str]) -> dict[str, Any]:
    """Run one command line; give its answer, and what it took."""
    from ckptool.cli import main

    out, err = io.StringIO(), io.StringIO()
    began = time.process_time()
    try:
        with redirect_stdout(out), redirect_stderr(err), limited_time(SECONDS), WATCH.watching():
            status = int(main(arguments))
    except BaseException as error:  # whatever leaves the command is a bug: tell it
        status, _ = 99, err.write(f"Traceback: {error!r}\n")
    seconds = time.process_time() - began
    return {"status": status, "out": out.getvalue()[:1_000_000], "err": err.getvalue(), "seconds": seconds}


def answer() -> None:
    """Answer for every file that standard input names."""
    resource.setrlimit(resource.RLIMIT_AS, (NBYTES, NBYTES))
    request = json.load(sys.stdin)
    rows = []
    for path in request["paths"]:
        target = Path(request["folder"]) / "out.pt"
        row = {command: run([command, path, *more]) for command, more in request["commands"].items()}
        row["convert"] = run(["convert", path, str(target)])
        row["written"] = target.exists()
        target.unlink(missing_ok=True)
        row["left"] = [left.name for left in Path(request["folder"]).iterdir()]
        rows.append(row)
    # Not the peak that getrusage tells: that counts the process which started this one, too.
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10
    json.dump({"rows": rows, "peak": peak, "torch": "torch" in sys.modules}, sys.stdout)


if __name__ == "__main__":
    answer()
