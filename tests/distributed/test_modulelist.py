"""Layers that a model calls, each sharded by FSDP2: hooks stay outside of them, and parameters are gathered."""

from __future__ import annotations

import copy
import os
import socket
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

import lightning_revlib as revlib
from tests.nn.test_modulelist import Model


def rank(index: int, port: int) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=index, world_size=2)
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    policies: list[tuple[torch.dtype, dict[str, Any]]] = [(torch.float64, {}), (torch.float32, {"mp_policy": mixed})]
    for dtype, policy in policies:
        torch.manual_seed(0)
        model = Model(5, 6, returns="tuple").to(dtype)
        revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
        twin = copy.deepcopy(model)
        revlib.swap(twin, {"layers": {"store_last": 5}})
        torch.manual_seed(index)
        x, found = torch.randn(3, 6).to(dtype), []
        for each in (model, twin):
            for layer in each.layers:
                fully_shard(layer, **policy)
            fully_shard(each, **policy)
            each(x).backward()
            found.append([p.grad.full_tensor() for p in each.parameters()])  # type: ignore[union-attr]
        for g, h in zip(*found, strict=True):
            torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-10)
        assert model.layers.drift is not None
    distributed.destroy_process_group()


@pytest.mark.slow
def test_fsdp2() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(rank, (port,), nprocs=2)
