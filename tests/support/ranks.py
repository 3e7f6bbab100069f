"""Write folders of torch.distributed.checkpoint with several ranks: ``python -m tests.support.ranks FOLDER``.

One process for each rank, forked after torch is imported; ``FOLDER/ranks-N`` is what N of them save together.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

WORLDS = (1, 2, 4)


def tensors() -> dict[str, torch.Tensor]:
    """Make tensors whose parts have every form: uneven, empty, in the middle, of any element type."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "rows.weight": random(7, 5),
        "columns.weight": random(6, 10),
        "deep.weight": random(3, 4, 5, 6),
        "few.weight": random(2, 3).bfloat16(),
        "tall.weight": random(301, 7).half(),
        "wide.weight": random(5, 4, 60),
        "complex.weight": torch.complex(random(3, 4).double(), random(3, 4).double()),
        "flags": random(9) > 0,
        "small": random(8).to(torch.float8_e4m3fn),
        "all.bias": random(11),
        "count": torch.tensor(2**40 + 1),
        "empty": torch.zeros(0, 4),
        "channels.weight": random(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "turned.weight": random(4, 6).t(),
        "turned.complex": torch.complex(random(4, 6).double(), random(4, 6).double()).t(),
    }


_SPLIT = {
    "rows.weight": 0,
    "columns.weight": 1,
    "deep.weight": 2,
    "few.weight": 0,
    "tall.weight": 1,
    "wide.weight": 1,
    "complex.weight": 1,
    "flags": 0,
}


def split(world: int) -> dict[str, Any]:
    """Distribute the tensors over all ranks, each along a dimension of its own; with four of them, one along two."""
    mesh = init_device_mesh("cpu", (world,))
    state: dict[str, Any] = tensors()
    for name, dimension in _SPLIT.items():
        state[name] = distribute_tensor(state[name], mesh, [Shard(dimension)])
    state["all.bias"] = distribute_tensor(state["all.bias"], mesh, [Replicate()])
    grid = init_device_mesh("cpu", (2, world // 2)) if world > 1 else init_device_mesh("cpu", (1, 1))
    both = torch.arange(9 * 10 * 3, dtype=torch.float32).reshape(9, 10, 3)
    state["grid.weight"] = distribute_tensor(both, grid, [Shard(1), Shard(0)])
    state["stack.weight"] = distribute_tensor(both + 1, grid, [Shard(0), Shard(0)])
    return state


def network() -> nn.Sequential:
    """Build a small network, the same on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 3))


def trained() -> tuple[dict[str, Any], dict[str, Any]]:
    """Train a step with FSDP2; give the state dicts of the model and of the optimizer, sharded."""
    model = fully_shard(network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.randn(4, 7)).square().sum().backward()
    optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return get_model_state_dict(model), get_optimizer_state_dict(model, optimizer, options=options)


def work(rank: int, world: int, out: Path) -> None:
    """Save, as one rank of ``world``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store-{world}", rank=rank, world_size=world)
    values = {"epoch": 3, "name": "a run", "groups": [{"lr": 0.5, "betas": (0.9, 0.99)}, {"lr": 0.25}]}
    dcp.save({"model": split(world), **values}, checkpoint_id=out / f"ranks-{world}")
    dcp.save(split(world), checkpoint_id=out / f"flat-{world}")
    model, optimizer = trained()
    dcp.save({"model": model, "optimizer": optimizer, "step": 7}, checkpoint_id=out / f"fsdp-{world}")
    floating = {name: tensor for name, tensor in model.items() if tensor.is_floating_point()}  # torch joins no others
    writer = dcp.HuggingFaceStorageWriter(str(out / f"hub-{world}"), dict.fromkeys(floating, 1), save_distributed=True)
    dcp.save(floating, storage_writer=writer)
    dist.destroy_process_group()


def main(out: Path) -> None:
    """Write one folder for each number of ranks."""
    for world in WORLDS:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    work(rank, world, out)
                    status = 0
                finally:
                    os._exit(status)
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
