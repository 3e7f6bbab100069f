"""Train and save with DeepSpeed on the CPU: ``python -m tests.support.deepspeed_ranks STAGE WORLD DTYPE FOLDER``."""

from __future__ import annotations

import os
import sys

import torch
from torch import nn


class Net(nn.Module):
    """Hold what partitions treat differently: biases, buffers, frozen and shared parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 9)
        self.register_buffer("scale", torch.linspace(0.5, 2, 9))
        self.register_buffer("count", torch.tensor(3))
        self.second = nn.Linear(9, 5, bias=False)
        self.third = nn.Linear(9, 5, bias=False)
        self.third.weight = self.second.weight
        self.frozen = nn.Linear(5, 3).requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.first(inputs) * self.scale.to(inputs.dtype)
        return self.frozen(self.second(hidden) + self.third(hidden)).sum()


def work(rank: int, stage: int, world: int, dtype: str, out: str) -> None:
    """Train two steps and save, as one rank."""
    import deepspeed

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = Net()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups = [{"params": [one for one in trained if (one.dim() > 1) == is_matrix]} for is_matrix in (True, False)]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
    }
    engine, *_ = deepspeed.initialize(model=net, config=config, model_parameters=groups)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    for _ in range(2):
        loss = engine(torch.randn(4, 7).to(kind))
        engine.backward(loss)
        engine.step()
    engine.save_checkpoint(out, tag="global_step2")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("PORT", "29871")}
    STAGE, WORLD, DTYPE, OUT = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.multiprocessing.spawn(work, (STAGE, WORLD, DTYPE, OUT), nprocs=WORLD)
