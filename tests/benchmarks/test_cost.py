"""What a command costs beside its peers: fresh processes, the same file, the same run. ``pytest -m benchmark -s``.

The yardsticks are ``torch.load`` for looking, an empty Typer app for starting, and for writing the three steps that a
careful person takes by hand: ``cp``, ``sync``, ``cmp``. For comparing they are ``cmp`` where the files are equal, and a
loop in NumPy that finds no more than the largest difference where all values changed; the tools ``sft`` (sft-cli) and
``diffai`` (diffai-python) where they are installed. Each pair is measured alternately; the best of each counts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmark

CKPTOOL = (sys.executable, "-m", "ckptool")
TORCH_LOAD = "import sys, torch; torch.load(sys.argv[1], mmap=True, weights_only=True)"
EMPTY_APP = """
import typer
app = typer.Typer()
@app.command()
def main() -> None: pass
app()
"""
LARGEST_DIFFERENCE = """
import sys, numpy as np
def data(path):
    file = open(path, "rb", buffering=0)
    file.seek(8 + int.from_bytes(file.read(8), "little"))
    return file
a, b = map(data, sys.argv[1:])
ours, theirs, largest = np.empty(1 << 18, "f4"), np.empty(1 << 18, "f4"), 0.0
while count := a.readinto(ours) // 4:
    b.readinto(theirs)
    largest = max(largest, float(np.abs(ours[:count] - theirs[:count]).max()))
print(largest)
"""
PEERS = {"sft": ("sft", "diff", "--delta"), "diffai": ("diffai",)}
MAX_ANON_MB = 60
MAX_DIFF_ANON_MB = 200
# An installed package has its bytecode; where the environment forbids to write it, every run would compile anew.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


@dataclass(frozen=True)
class Cost:
    """Hold what one process took: seconds, and its peak private memory in MB (10^6 bytes)."""

    wall: float
    cpu: float
    anon: float


def anon_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return int(lines[0].split()[1]) * 1024 / 1e6 if lines else 0.0


def measure(command: Sequence[str | Path], answers: Sequence[int] = (0,)) -> Cost:
    """Run a command to one of these ends; children that it waits for count in ``cpu``, not in ``anon``."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    peak, done = 0.0, 0
    while not done:
        peak = max(peak, anon_mb(process.pid))
        time.sleep(0.002)
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in answers, command
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak)


def rival(ours: Sequence[str | Path], theirs: Sequence[str | Path], out: Path | None, times: int) -> tuple[Cost, Cost]:
    """Measure both in turn, on a target that is gone again each time, and give the best of each."""
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    for _ in range(times):
        for found, command in zip(costs, (ours, theirs), strict=True):
            found.append(measure(command, (0, 1)))
            if out is not None:
                out.unlink()
    return best(costs[0]), best(costs[1])


def best(costs: list[Cost]) -> Cost:
    return Cost(min(cost.wall for cost in costs), min(cost.cpu for cost in costs), max(cost.anon for cost in costs))


def show(what: str, unit: str, ours: float, theirs: float, limit: float, anon: float) -> float:
    ratio = ours / theirs
    print(f"{what:48} {unit} {ours:7.3f} s : {theirs:7.3f} s = {ratio:5.3f} (limit {limit}), private {anon:5.1f} MB")
    return ratio


def write_checkpoint(path: Path, tensors: int, elements: int) -> None:
    """Save what Lightning and torch.compile would have: ``tensors`` float32 tensors under wrapped names."""
    import torch

    state = {f"model._orig_mod.layers.{i}.weight": torch.randn(elements) for i in range(tensors)}
    torch.save({"epoch": 3, "global_step": 99, "pytorch-lightning_version": "2.6.0", "state_dict": state}, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("cost")
    write_checkpoint(out / "large.pt", 500, 1 << 19)
    write_checkpoint(out / "5000.pt", 5_000, 16)
    write_checkpoint(out / "50000.pt", 50_000, 16)
    measure((*CKPTOOL, "convert", out / "large.pt", out / "large.safetensors"))
    yield out
    shutil.rmtree(out)


@pytest.mark.parametrize("options", [(), ("--tensors", "--json")], ids=["summary", "tensors json"])
@pytest.mark.parametrize(("name", "limit"), [("large", 0.1), ("5000", 0.11), ("50000", 0.2)])
def test_inspect_beside_torch_load(folder, name, limit, options):
    path = folder / f"{name}.pt"
    ours = (*CKPTOOL, "inspect", path, *options)
    mine, yours = rival(ours, (sys.executable, "-c", TORCH_LOAD, path), None, 5)
    assert show(f"inspect {name} {' '.join(options)}", "cpu", mine.cpu, yours.cpu, limit, mine.anon) <= limit


def test_help_beside_an_empty_typer_app():
    mine, yours = rival((*CKPTOOL, "--help"), (sys.executable, "-c", EMPTY_APP, "--help"), None, 10)
    assert show("--help", "cpu", mine.cpu, yours.cpu, 1.5, mine.anon) <= 1.5


@pytest.mark.parametrize(
    ("command", "source", "target"),
    [
        ("convert", "large.pt", "out.safetensors"),
        ("convert", "large.safetensors", "out.pt"),
        ("strip-prefixes", "large.pt", "out.pt"),
        ("strip-prefixes", "large.safetensors", "out.safetensors"),
    ],
)
def test_writing_beside_copy_sync_compare(folder, command, source, target):
    given, out = folder / source, folder / target
    by_hand = f"cp '{given}' '{out}' && sync '{out}' && cmp '{given}' '{out}'"
    mine, yours = rival((*CKPTOOL, command, given, out), ("sh", "-c", by_hand), out, 4)
    ratio = show(f"{command} {source} {target}", "wall", mine.wall, yours.wall, 1.5, mine.anon)
    assert ratio <= 1.5
    assert mine.anon < MAX_ANON_MB


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write about 1 GB three times: twice the same values in one container, once all of them changed a little."""
    import safetensors.torch
    import torch

    out = tmp_path_factory.mktemp("diff")
    state = {f"layers.{i}.weight": torch.randn(1 << 11, 1 << 10) for i in range(128)}
    torch.save(state, out / "a.pt")
    shutil.copyfile(out / "a.pt", out / "same.pt")
    safetensors.torch.save_file(state, out / "a.safetensors")
    for tensor in state.values():
        tensor += 1e-3 * torch.randn_like(tensor)
    safetensors.torch.save_file(state, out / "b.safetensors")
    yield out
    shutil.rmtree(out)


def test_diff_of_equal_files_beside_cmp(pair):
    files = pair / "a.pt", pair / "same.pt"
    mine, yours = rival((*CKPTOOL, "diff", *files), ("cmp", *files), None, 5)
    assert show("diff, equal", "wall", mine.wall, yours.wall, 1.5, mine.anon) <= 1.5
    assert mine.anon < MAX_DIFF_ANON_MB


def test_diff_of_changed_files_beside_a_loop(pair):
    files = pair / "a.safetensors", pair / "b.safetensors"
    mine, yours = rival((*CKPTOOL, "diff", *files), (sys.executable, "-c", LARGEST_DIFFERENCE, *files), None, 5)
    assert show("diff, all values changed", "wall", mine.wall, yours.wall, 1.5, mine.anon) <= 1.5
    assert mine.anon < MAX_DIFF_ANON_MB


@pytest.mark.parametrize("peer", PEERS)
def test_diff_beside_a_peer(pair, peer):
    if shutil.which(peer) is None:
        pytest.skip(f"{peer} is not installed")
    files = pair / "a.safetensors", pair / "b.safetensors"
    mine, yours = rival((*CKPTOOL, "diff", *files), (*PEERS[peer], *files), None, 2)
    assert show(f"diff beside {peer}", "wall", mine.wall, yours.wall, 1.0, mine.anon) <= 1.0
