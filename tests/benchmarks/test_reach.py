"""What distributed, large and many tensors cost. ``pytest -m benchmark -s tests/benchmarks/test_reach.py``.

A folder of torch.distributed.checkpoint is set beside torch's own ``dcp_to_torch_save`` on the same folder. What size
and count cost is printed: of files whose tensors are holes on the disk, and of many small tensors.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks.test_cost import CKPTOOL, best, measure, show
from tests.support.sparse_files import sparse_safetensors

pytestmark = pytest.mark.benchmark

DCP_TO_TORCH = """
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2])
"""
SAVE = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
out, world = sys.argv[1], 4
children = []
for rank in range(world):
    if os.fork():
        continue
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    state = {}
    for i in range(64):
        shape = (512, 2048) if i % 4 else (2048, 512)  # every fourth is split along its columns
        state[f"layers.{i}.weight"] = DTensor.from_local(torch.randn(shape), mesh, [Shard(0 if i % 4 else 1)])
    dcp.save({"model": state}, checkpoint_id=out)
    os._exit(0)
for _ in range(world):
    os.wait()
"""
MAX_ANON_MB = 60
GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Save 1 GiB in parts of four ranks."""
    out = tmp_path_factory.mktemp("reach")
    measure((sys.executable, "-c", SAVE, out / "parts"))
    yield out
    shutil.rmtree(out)


def test_distributed_beside_torch(folder: Path) -> None:
    source, ours, theirs = folder / "parts", folder / "ours.safetensors", folder / "theirs.pt"
    mine, yours = [], []
    for _ in range(2):
        mine.append(measure((*CKPTOOL, "convert", source, ours)))
        yours.append(measure((sys.executable, "-c", DCP_TO_TORCH, source, theirs)))
        ours.unlink()
        theirs.unlink()
    own, peer = best(mine), best(yours)
    assert show("distributed to one file", "wall", own.wall, peer.wall, 0.25, own.anon) <= 0.25
    print(f"private memory {own.anon:.1f} MB : {peer.anon:.1f} MB (limit 0.1)")
    assert own.anon <= 0.1 * peer.anon


def test_inspecting_a_distributed_folder_reads_its_metadata_alone(folder: Path) -> None:
    own = measure((*CKPTOOL, "inspect", folder / "parts"))
    print(f"inspect 64 tensors of 4 ranks          wall {own.wall:.3f} s, private {own.anon:.1f} MB")
    assert own.anon < MAX_ANON_MB


def test_size_costs_nothing_to_inspect(tmp_path: Path) -> None:
    costs = {}
    for size in (1, 5, 20):
        path = sparse_safetensors(tmp_path / f"{size}.safetensors", size * GB, 500)
        costs[size] = best([measure((*CKPTOOL, "inspect", path)) for _ in range(3)])
        print(f"inspect {size:3} GB of 500 tensors      cpu {costs[size].cpu:.3f} s, private {costs[size].anon:.1f} MB")
    assert costs[20].cpu < 1.3 * costs[1].cpu
    assert costs[20].anon < 1.1 * costs[1].anon


@pytest.mark.parametrize("size", [1, 5])
def test_memory_is_flat_whatever_is_written(tmp_path: Path, size: int) -> None:
    if shutil.disk_usage(tmp_path).free < 3 * size * GB:
        pytest.skip("the disk has no room")
    path = sparse_safetensors(tmp_path / "in.safetensors", size * GB, 500)
    own = measure((*CKPTOOL, "convert", path, tmp_path / "out.pt"))
    print(f"convert {size} GB     wall {own.wall:.2f} s ({size / own.wall:.2f} GB/s), private {own.anon:.1f} MB")
    (tmp_path / "out.pt").unlink()
    assert own.anon < MAX_ANON_MB


@pytest.mark.parametrize("count", [1_000, 10_000, 100_000])
def test_count_costs_what_it_prints(tmp_path: Path, count: int) -> None:
    import torch

    state = {f"layers.{i // 10}.part{i % 10}.weight": torch.zeros(4) for i in range(count)}
    torch.save(state, tmp_path / "in.pt")
    views = {
        "inspect": ("inspect", tmp_path / "in.pt"),
        "inspect --tensors": ("inspect", "--tensors", tmp_path / "in.pt"),
        "inspect --tree": ("inspect", "--tree", tmp_path / "in.pt"),
        "inspect --tensors --json": ("inspect", "--tensors", "--json", tmp_path / "in.pt"),
        "diff": ("diff", tmp_path / "in.pt", tmp_path / "in.pt"),
        "convert": ("convert", "--force", tmp_path / "in.pt", tmp_path / "out.safetensors"),
        "verify": ("verify", tmp_path / "in.pt"),
    }
    for name, command in views.items():
        own = measure((*CKPTOOL, *command), (0, 1, 2))
        print(f"{name:26} {count:7} tensors  wall {own.wall:6.2f} s, private {own.anon:6.1f} MB")
        assert own.wall < 0.001 * count + 5
