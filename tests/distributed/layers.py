"""A model that calls the layers of a list, each sharded by FSDP2: gradients as if the layers were stored."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lightning_revlib as revlib


class Layer(nn.Module):
    """A residual layer with a further output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = x + self.linear(self.norm(x)).tanh()
        return out, out.square().mean()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 1)
        self.layers = nn.ModuleList([Layer() for _ in range(5)])

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.stem(x), 0.0
        for layer in self.layers:
            x, further = layer(x)
            total = total + further
        return self.head(x).sum() + total


def main(out: Path) -> None:
    """Save how far the gradients are from those of stored layers, and whether backward has rebuilt the input."""
    rank = int(os.environ["LOCAL_RANK"])
    distributed.init_process_group("gloo", rank=rank)
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    policies: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
        "float64": (torch.float64, {}),
        "mixed precision": (torch.float32, {"mp_policy": mixed}),
    }
    found: dict[str, Any] = {}
    for name, (dtype, policy) in policies.items():
        torch.manual_seed(0)
        model = Model().to(dtype)
        revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
        twin = copy.deepcopy(model)
        revlib.swap(twin, {"layers": {"store_last": 5}})
        torch.manual_seed(rank)
        x, gradients = torch.randn(3, 6).to(dtype), []
        for each in (model, twin):
            for layer in each.layers:
                fully_shard(layer, **policy)
            fully_shard(each, **policy)
            each(x).backward()
            gradients.append([p.grad.full_tensor() for p in each.parameters()])  # type: ignore[union-attr]
        apart = [((g - h).abs() / (1 + h.abs())).max().item() for g, h in zip(*gradients, strict=True)]
        found[name] = {"gradients": max(apart), "is rebuilt": model.layers.drift is not None}
    distributed.destroy_process_group()
    if rank == 0:
        torch.save(found, out / "result.pt")
