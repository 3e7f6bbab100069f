"""DTensor and ShardedTensor: whole on this rank, or one rank's part; written by torch under a group without peers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard import sharded_tensor, sharding_spec
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

WHOLE = torch.arange(24.0).reshape(12, 2)

pytestmark = pytest.mark.filterwarnings("ignore")


@contextmanager
def group(world: int, rank: int) -> Iterator[Any]:
    """Be one rank of a group whose other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    finally:
        dist.destroy_process_group()


def placed(placement: Any, local: torch.Tensor) -> Callable[[Any], Any]:
    return lambda mesh: DTensor.from_local(local, mesh, [placement], run_check=False)


def sharded(mesh: Any) -> Any:
    ranks = [f"rank:{rank}/cpu" for rank in range(mesh.size())]
    tensor = sharded_tensor.zeros(sharding_spec.ChunkShardingSpec(dim=0, placements=ranks), 12, 2)
    local = tensor.local_shards()[0].tensor
    local.copy_(WHOLE[: len(local)])
    return tensor


HERE: dict[str, tuple[int, int, Callable[[Any], Any]]] = {
    "replicated over 2": (2, 1, placed(Replicate(), WHOLE)),
    "sharded over 1": (1, 0, placed(Shard(0), WHOLE)),
    "a sum of 1": (1, 0, placed(Partial(), WHOLE)),
    "a ShardedTensor of 1": (1, 0, sharded),
    "a parameter": (2, 0, lambda mesh: torch.nn.Parameter(placed(Replicate(), WHOLE)(mesh))),
}
APART: dict[str, tuple[int, int, Callable[[Any], Any], str, dict[str, Any]]] = {
    "rows": (2, 1, placed(Shard(0), WHOLE[:6]), "rank 1 has [6, 2] of [12, 2], Shard(0); the rest is on rank 0",
             {"kind": "dtensor", "rank": 1, "ranks": [0, 1], "placements": ["Shard(0)"], "local_shapes": [[6, 2]]}),
    "columns": (2, 0, placed(Shard(1), WHOLE[:, :1]), "rank 0 has [12, 1] of [12, 2], Shard(1); the rest is on rank 1",
                {"bytes": 48, "shape": [12, 2]}),
    "a term of a sum": (2, 0, placed(Partial(), WHOLE), "Partial(sum); the rest is on rank 1",
                        {"placements": ["Partial(sum)"]}),
    "a ShardedTensor": (3, 1, sharded, "rank 1 has [4, 2] of [12, 2]; the rest is on ranks 0, 2",
                        {"kind": "sharded", "rank": 1, "ranks": [0, 1, 2], "local_shapes": [[4, 2]], "bytes": 32}),
}  # fmt: skip


def save(path: Path, world: int, rank: int, make: Callable[[Any], Any]) -> None:
    with group(world, rank) as mesh:
        torch.save({"module.w": torch.ones(3), "module.x": make(mesh)}, path)


@pytest.mark.parametrize("name", HERE)
def test_what_is_whole_here_becomes_the_plain_tensor(name: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    save(tmp_path / "in.pt", *HERE[name])
    ran = run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt")
    assert (ran.status, "1 distributed tensors are whole on this rank" in ran.err) == (0, True), ran.err
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert type(written["x"]) is torch.Tensor
    assert torch.equal(written["x"], WHOLE)
    assert json.loads(run("inspect", tmp_path / "in.pt", "--json").out)["not_dense"] == []


@pytest.mark.parametrize("name", APART)
def test_a_part_is_refused_and_says_where_the_rest_is(name: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    world, rank, make, says, facts = APART[name]
    for other in range(world):
        save(tmp_path / f"model_rank{other:02}_of2.pt", world, other, make)
    path = tmp_path / f"model_rank{rank:02}_of2.pt"
    ran = run("convert", path, tmp_path / "out.pt", "--keep-prefixes")
    assert (ran.status, says in ran.err, (tmp_path / "out.pt").exists()) == (2, True, False), ran.err
    others = [f'"model_rank{other:02}_of2.pt"' for other in range(world) if other != rank]
    assert f"beside it: {', '.join(others)}" in ran.err
    (shown,) = json.loads(run("inspect", path, "--json").out)["not_dense"]
    assert {field: shown[field] for field in facts} == facts


def test_other_files_are_not_taken_for_those_of_other_ranks(tmp_path: Path, run: Callable[..., Any]) -> None:
    path = tmp_path / "epoch_1_rank_0.pt"
    save(path, 2, 0, placed(Shard(0), WHOLE[:6]))
    (tmp_path / "epoch_2_rank_0.pt").touch()
    assert "beside it" not in run("convert", path, tmp_path / "out.pt").err


def test_an_optimizer_with_distributed_tensors_is_kept(tmp_path: Path, run: Callable[..., Any]) -> None:
    with group(1, 0) as mesh:
        tensor = placed(Shard(0), WHOLE)(mesh)
        state = {"state": {0: {"exp_avg": tensor}}, "param_groups": [{"params": [0]}]}
        torch.save({"model": {"x": tensor, "w": torch.ones(2)}, "optimizer": state}, tmp_path / "in.pt")
    assert run("strip-prefixes", tmp_path / "in.pt", tmp_path / "out.pt", "--keep-rest").status == 0
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(written["optimizer"]["state"][0]["exp_avg"], WHOLE)
