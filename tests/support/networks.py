"""Small networks that several tests build."""

from __future__ import annotations

import torch
from torch import nn


class Net(nn.Module):
    """Hold what state dicts are made of: blocks, buffers, a child whose name is close to a wrapper's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))
        self.attn_module = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2, bias=False)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.head(self.attn_module(self.layers[1](self.layers[0](values))))
