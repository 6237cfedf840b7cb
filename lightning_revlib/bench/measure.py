"""What is measured of one contestant: gradients, bytes, FLOPs. The times of several, in turns: `timing`.

held    bytes alive after forward that were not before it, the input left out
peak    the most alive in backward, the output's gradient included, the parameters' gradients left out
flops   forward and backward, by FlopCounterMode; on CPU it does not count attention's own products
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_revlib.nn import MemoryMeter

TOLERANCE = 1e-5  # of gradients in float64: rounding grows with the depth, and mistakes are larger


class _NoModules:
    """In place of the counter's tracker of modules, whose hooks do not bear a backward within a backward."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *args: Any) -> None: ...


class Flops(FlopCounterMode):
    """The same counts, in total only, of any module."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _NoModules()  # type: ignore[assignment]


class Counts(NamedTuple):
    held: int
    peak: int
    output: int  # the output's bytes
    flops: int
    allocated: int | None  # CUDA's own peak above what was allocated before the step


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        return module(x)


def step(module: nn.Module, x: Tensor) -> None:
    """Forward and backward; gradients are new tensors."""
    y = _forward(module, x)
    y.backward(torch.ones_like(y))


def clear(module: nn.Module, x: Tensor) -> None:
    for tensor in (x, *module.parameters()):
        tensor.grad = None


def gradients(module: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Output and gradients, without autocast, of a loss in which every output element counts differently."""
    torch.manual_seed(1)
    clear(module, x)
    y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y))
    return [y.detach(), x.grad, *[p.grad for p in module.parameters()]]


def error(reference: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> float:
    """The largest relative error; what is missing is zero, what is below a thousandth of the largest counts as that."""
    pairs = [
        (x, torch.zeros_like(x) if y is None else y) for x, y in zip(reference, found, strict=True) if x is not None
    ]
    floor = 1e-3 * max(x.norm().item() for x, _ in pairs)
    largest = max((x - y).norm().item() / max(x.norm().item(), floor, 1e-300) for x, y in pairs)
    return largest if math.isfinite(largest) else math.inf


def counted(module: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """Bytes held, peak, and those of the output; leaves gradients behind."""
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x.grad = None
    with MemoryMeter() as meter:
        y = _forward(module, x)
        held, gradient = meter.live, torch.ones_like(y)
        meter.reset_peak()
        y.backward(gradient)
        return held, meter.peak, y.nbytes


def counts(module: nn.Module, x: Tensor) -> Counts:
    with Flops() as counter:
        held, peak, output = counted(module, x)
    allocated = None
    if x.is_cuda:
        x.grad = None
        torch.cuda.synchronize(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        step(module, x)
        allocated = torch.cuda.max_memory_allocated(x.device) - before
    clear(module, x)
    return Counts(held, peak, output, counter.get_total_flops(), allocated)
