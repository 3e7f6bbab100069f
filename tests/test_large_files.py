"""Files larger than memory, most of them holes: looked at in no time, written in flat memory, left off on Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.sparse_files import sparse_safetensors

GB = 10**9
COUNT = 50


def sparse_torch(path: Path, nbytes: int) -> None:
    with FakeTensorMode():
        state = {f"layers.{i}.weight": torch.empty(nbytes // COUNT // 4) for i in range(COUNT)}
    with torch.serialization.skip_data(materialize_fake_tensors=True):  # takes neither memory nor disk
        torch.save(state, path)


@pytest.mark.large
@pytest.mark.parametrize(
    ("name", "write"), [("in.safetensors", partial(sparse_safetensors, count=COUNT)), ("in.pt", sparse_torch)]
)
def test_twenty_gigabytes_are_looked_at_like_twenty_megabytes(run: Any, tmp_path: Path, name: str, write: Any) -> None:
    answers = []
    for nbytes in (20 * 10**6, 20 * GB):
        write(tmp_path / name, nbytes)
        assert (tmp_path / name).stat().st_blocks < 10**6
        ran = run("inspect", tmp_path / name, "--json", "--tensors")
        document = json.loads(ran.out)
        assert (ran.status, len(document["tensors"])) == (0, COUNT)
        assert document["state_dicts"][0]["bytes"] == nbytes
        answers.append(len(ran.out))
    assert answers[1] < 1.2 * answers[0]
    ran = run("convert", tmp_path / name, "--dry-run", "--to", "pt", "--json")
    assert (ran.status, json.loads(ran.out)["target_bytes"]) == (0, 20 * GB), ran.err


def test_control_c_leaves_a_large_file_off(tmp_path: Path) -> None:
    source, out = tmp_path / "in.safetensors", tmp_path / "out"
    out.mkdir()
    sparse_safetensors(source, 20 * GB, COUNT)
    child = subprocess.Popen(
        [sys.executable, "-m", "ckptool", "convert", source, out / "out.pt"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    deadline = time.monotonic() + 60
    while sum(path.stat().st_size for path in out.iterdir()) < 50 << 20:
        if child.poll() is not None:  # the disk has no room for it, and it said so before it began
            assert "free" in child.communicate()[1]
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)
    status = Path(f"/proc/{child.pid}/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert (child.returncode, list(out.iterdir())) == (130, [])
    assert peak < 100 << 10  # kB
