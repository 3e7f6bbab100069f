"""Lay out folders of DeepSpeed ZeRO as it does: files, keys and partitions of its version 0.19."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

TAG = "global_step2"
Tensors = Mapping[str, torch.Tensor]


def padded(vector: torch.Tensor, multiple: int) -> torch.Tensor:
    return torch.nn.functional.pad(vector, (0, -len(vector) % multiple), value=7.0)


def joined_partitions(group: Tensors, world: int, gaps: Sequence[int]) -> list[torch.Tensor]:
    """Split a parameter group as stages 1 and 2 do: one vector, aligned, and without its padding on the last rank."""
    pieces = [torch.nn.functional.pad(one.flatten(), (0, gap)) for one, gap in zip(group.values(), gaps, strict=True)]
    whole = torch.cat(pieces)
    share = len(padded(whole, 2 * world)) // world
    return [whole[rank * share : (rank + 1) * share].clone() for rank in range(world)]


def dealt_partitions(group: Tensors, world: int, at_most: int) -> list[list[torch.Tensor]]:
    """Deal the parameters out as stage 3 does, for each rank in flat tensors of at most so many elements."""
    ranks = []
    for rank in range(world):
        shares = []
        for one in group.values():
            share = -(-one.numel() // world)
            shares.append(padded(one.flatten(), world)[rank * share : (rank + 1) * share])
        ranks.append([part.clone() for part in torch.cat(shares).split(at_most)])
    return ranks


def dealt(one: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    share = -(-one.numel() // world)
    return padded(one.flatten(), world)[rank * share : (rank + 1) * share].clone()


def write_zero(
    folder: Path,
    groups: Sequence[Tensors],
    *,
    stage: int,
    world: int,
    buffers: Tensors | None = None,
    frozen: Tensors | None = None,
    shared: Mapping[str, str] | None = None,
    paddings: Sequence[Sequence[int]] | None = None,
    prefix: str = "bf16_",
    half: torch.dtype = torch.bfloat16,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write the files of all ranks and the name of the latest tag; give the folder."""
    inner = folder / TAG
    inner.mkdir(parents=True)
    (folder / "latest").write_text(TAG)
    buffers, frozen, shared = buffers or {}, frozen or {}, shared or {}
    trained = {name: tensor for group in groups for name, tensor in group.items()}
    module: dict[str, torch.Tensor] = OrderedDict()
    for name, tensor in {**trained, **frozen}.items():
        module[name] = torch.empty(0, dtype=half) if stage == 3 else tensor.to(half)
    module.update(buffers)
    module.update({name: module[source] for name, source in shared.items()})
    gaps = paddings or [[0] * len(group) for group in groups]
    flat = [joined_partitions(group, world, gap) for group, gap in zip(groups, gaps, strict=True)]
    deal = dealt_partitions(trained, world, 1 + math.ceil(sum(map(torch.Tensor.numel, trained.values())) / 3))
    for rank in range(world):
        state = {
            "zero_stage": stage,
            "partition_count": [world] * len(groups) if stage == 2 else world,
            "loss_scaler": None,
            "base_optimizer_state": {"state": {0: {"step": 2}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        }
        if stage == 3:
            state["fp32_flat_groups"] = deal[rank]
        else:
            state["single_partition_of_fp32_groups"] = [group[rank] for group in flat]
        if paddings is not None:
            state["param_alignment_paddings"] = paddings
        name = f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"}, inner / name)
    for rank in range(world if stage == 3 else 1):
        fragments = {name: dealt(one, rank, world) if stage == 3 else one for name, one in frozen.items()}
        root = {
            "module": module,
            "buffer_names": list(buffers),
            "optimizer": None,
            "param_shapes": [OrderedDict((name, one.shape) for name, one in group.items()) for group in groups],
            "frozen_param_shapes": {name: one.shape for name, one in frozen.items()},
            "frozen_param_fragments": fragments,
            "shared_params": dict(shared),
            "global_steps": 2,
            "ds_config": {"zero_optimization": {"stage": stage}},
            "ds_version": "0.19.8",
            **(extra or {}),
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        torch.save(root, inner / name)
    return folder
