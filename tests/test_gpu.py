"""On CUDA: fit, one process of NCCL, DeepSpeed's stages, memory that does not grow with depth. `pytest -m gpu`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_revlib as revlib
from tests.strategies.helpers import Net, data, trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def fit(tmp_path: Path, strategy: Any, **options: Any) -> torch.Tensor:
    L.seed_everything(5, verbose=False)
    net = Net()
    trainer(tmp_path, strategy=strategy, **{"accelerator": "cuda", "devices": 1, **options}).fit(net, data(), data())
    return torch.cat([getattr(p, "full_tensor", lambda p=p: p)().detach().cpu().flatten() for p in net.parameters()])


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed", "16-mixed"])
def test_fit(tmp_path: Path, precision: Any) -> None:
    plain, ours = (fit(tmp_path, strategy, precision=precision) for strategy in ("auto", "reversible"))
    tolerance = {"64-true": 1e-10, "32-true": 1e-5}.get(precision, 5e-2)
    assert torch.allclose(plain, ours, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("plain", "ours"), [("ddp", "ddp"), ("fsdp", "reversible_fsdp")])
def test_nccl_with_one_process(tmp_path: Path, plain: str, ours: str) -> None:
    found = []
    for strategy, callbacks in ((plain, []), (ours, [revlib.ReversibleCallback()] if ours == plain else [])):
        try:
            found.append(fit(tmp_path, strategy, callbacks=callbacks))
            assert torch.distributed.get_backend() == "nccl"
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    assert torch.allclose(*found, rtol=1e-5, atol=1e-5), (found[0] - found[1]).abs().max()


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", [False, True])
def test_deepspeed(tmp_path: Path, stage: int, offload: bool) -> None:
    pytest.importorskip("deepspeed")
    net = Net()
    strategy = revlib.ReversibleDeepSpeedStrategy(stage=stage, offload_optimizer=offload)
    strategy.config["zero_force_ds_cpu_optimizer"] = False  # the net's own optimizer, also on the host
    trainer(tmp_path, strategy=strategy, accelerator="cuda", devices=1, precision="bf16-mixed").fit(net, data(), data())
    assert all(torch.isfinite(loss) for loss in net.losses) and net.losses[-1] < net.losses[0]


class Deep(Net):
    def __init__(self, depth: int) -> None:
        self.depth = depth
        super().__init__()

    def build(self) -> None:
        self.stem, self.head = nn.Linear(8, 512), nn.Linear(512, 1)
        blocks = [nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(self.depth)]
        self.net = revlib.CoupledSequential(*blocks)


def peak(tmp_path: Path, strategy: str, depth: int) -> int:
    """Bytes allocated at most in training, less those of parameters, their gradients and the optimizer."""
    loader = DataLoader(TensorDataset(torch.randn(32768, 8)), batch_size=8192)
    net = Deep(depth)
    torch.cuda.reset_peak_memory_stats()
    trainer(tmp_path, strategy=strategy, accelerator="cuda", devices=1, max_epochs=1).fit(net, loader)
    return torch.cuda.max_memory_allocated() - 4 * sum(p.nbytes for p in net.parameters())


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    shallow, deep = (peak(tmp_path, "reversible", depth) for depth in (8, 64))
    assert deep <= 1.1 * shallow
    assert deep < 0.3 * peak(tmp_path, "auto", 64)


@pytest.mark.parametrize("depth", [1, 2, 5, 16])
@pytest.mark.parametrize("way", ["overlap", "offload"])
def test_streams(way: str, depth: int) -> None:
    """Wide blocks, whose kernels take long enough for a race to show, and memory that is used again at once."""
    parts = nn.BatchNorm1d(1024), nn.Linear(1024, 4096), nn.GELU(), nn.Dropout(0.1), nn.Linear(4096, 1024)
    blocks = [nn.Sequential(*copy.deepcopy(parts)) for _ in range(depth)]
    plain = revlib.CoupledSequential(*blocks).cuda()
    options: dict[str, Any] = {"overlap": True} if way == "overlap" else {"treatments": ["offload"] * depth}
    ours = revlib.ReversibleSequential(*[copy.deepcopy(block) for block in blocks], **options).cuda()
    for seed in range(5):
        x = torch.randn(2048, 2048, device="cuda")
        grads = []
        for stack in (plain, ours):
            torch.manual_seed(seed)
            stack.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=seed % 2 == 1):
                y = stack(x.requires_grad_())
            y.square().mean().backward()
            grads.append([p.grad for p in stack.parameters()])
        for expected, found in zip(*grads, strict=True):
            assert (found - expected).norm() <= (0.05 if seed % 2 else 1e-4) * expected.norm().clamp_min(1e-6)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("value", ["auto", 0.8, 0.4])
def test_budget(value: Any, half: bool) -> None:
    """What the allocator gives out is within the plan's limit, but for kernels' scratch: 32 MiB of cuBLAS alone."""
    blocks = [nn.Sequential(nn.LayerNorm(512), nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)) for _ in range(8)]
    stack = revlib.ReversibleSequential(*blocks, memory_budget=value).cuda()
    x, peaks = torch.randn(8192, 1024, device="cuda", requires_grad=True), []
    for _ in range(3):
        for p in stack.parameters():
            p.grad = torch.zeros_like(p)
        x.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16, enabled=half):
            y = stack(x)
        y.backward(torch.ones_like(y))
        del y
        peaks.append(torch.cuda.max_memory_allocated() - before)
    plan = stack.plan
    assert plan is not None and max(peaks) <= plan.limit + 2**26, (peaks, plan)
    if value == "auto":
        assert plan.treatments["stack"] == ("store",) * 8
    else:
        assert peaks[-1] >= 0.7 * plan.limit
