"""Measure one contestant's gradients, bytes and FLOPs; `timing` measures the times of several.

held    bytes allocated in forward that are alive after it, without the input
peak    the most bytes alive in backward, with the output's gradient, without the parameters' gradients
flops   forward and backward, by the formulas of FlopCounterMode, which has none for attention on the CPU
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_revlib.nn.meter import CostMeter

TOLERANCE = (
    1e-5  # relative error of gradients in float64: rounding grows with depth and stays below, wrong gradients lie above
)


class Counts(NamedTuple):
    """Bytes and FLOPs of one forward and backward."""

    held: int
    peak: int
    output: int  # the output's bytes
    flops: int
    allocated: int | None  # CUDA's own peak above what was allocated before the step


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        return module(x)


def step(module: nn.Module, x: Tensor) -> None:
    """Run forward and backward."""
    y = _forward(module, x)
    y.backward(torch.ones_like(y))


def clear(module: nn.Module, x: Tensor) -> None:
    """Free the gradients of the input and the parameters."""
    for tensor in (x, *module.parameters()):
        tensor.grad = None


def gradients(module: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Return output and gradients, without autocast, of a loss that weights every output element differently."""
    torch.manual_seed(1)
    clear(module, x)
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y))
    return [y.detach(), x.grad, *[p.grad for p in module.parameters()]]


def error(reference: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> float:
    """Return the largest relative error.

    A missing tensor counts as zero. Norms below a thousandth of the largest one count as a thousandth of it.
    """
    pairs = [
        (x, torch.zeros_like(x) if y is None else y) for x, y in zip(reference, found, strict=True) if x is not None
    ]
    floor = 1e-3 * max(x.norm().item() for x, _ in pairs)
    largest = max((x - y).norm().item() / max(x.norm().item(), floor, 1e-300) for x, y in pairs)
    return largest if math.isfinite(largest) else math.inf


def counted(module: nn.Module, x: Tensor) -> tuple[int, int, int, int]:
    """Return the bytes held, the peak, the bytes of the output, and FLOPs; gradients stay."""
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x.grad = None
    with CostMeter() as meter:
        y = _forward(module, x)
        held, gradient = meter.live, torch.ones_like(y)
        meter.reset_peak()
        y.backward(gradient)
        return held, meter.peak, y.nbytes, meter.flops


def counts(module: nn.Module, x: Tensor) -> Counts:
    """Return bytes and FLOPs of one forward and backward, and free the gradients."""
    held, peak, output, flops = counted(module, x)
    allocated = None
    if x.is_cuda:
        x.grad = None
        torch.cuda.synchronize(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        step(module, x)
        allocated = torch.cuda.max_memory_allocated(x.device) - before
    clear(module, x)
    return Counts(held, peak, output, flops, allocated)
