"""Simulate the peaks of the sizes that the benchmark has for CUDA, without a device and without the memory.

    revlib bench study=peaks
    revlib bench study=peaks workloads=[mlp,conv]

The most bytes of a step under autocast to bfloat16, without parameters and their gradients, by fake tensors on the CPU.
docs/measurements/cuda.md compares them with what CUDA's allocator gave out for the same steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_revlib.bench.contestants import Build, checkpointed, ours, plain
from lightning_revlib.bench.workloads import WORKLOADS, Size, Workload
from lightning_revlib.nn import MemoryMeter
from lightning_revlib.nn.internals import FakeTensorMode
from lightning_revlib.nn.meter import format_bytes

WAYS: dict[str, Build] = {"plain": plain, "checkpoint": checkpointed(), "lightning_revlib": ours}


def peak(build: Build, workload: Workload, size: Size) -> int:
    """Return the most bytes of one forward and backward."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        module, x = build(workload.stack(size), workload.draws), workload.input(size, requires_grad=True)
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        with MemoryMeter() as meter:
            with torch.autocast("cpu", torch.bfloat16):
                y = module(x)
            y.backward(torch.ones_like(y))
    return meter.peak


def main(workloads: Sequence[str] | None = None) -> None:
    """Print a table with a row for each size. Raises ValueError for an unknown workload."""
    if unknown := [name for name in workloads or () if name not in WORKLOADS]:
        raise ValueError(f"workloads={unknown}: unknown; take some of {', '.join(WORKLOADS)}")
    print("|", " | ".join(["simulated peak", *WAYS]), "|\n|---" + "|---:" * len(WAYS) + "|")
    for workload in [WORKLOADS[name] for name in workloads or WORKLOADS]:
        for size in workload.cuda:
            peaks = [format_bytes(peak(build, workload, size)) for build in WAYS.values()]
            name = f"{workload.name}, depth {size.depth}, width {size.width}, batch {size.batch}"
            print("|", " | ".join([name, *peaks]), "|", flush=True)
