"""`report`: what a swap would do to a model, measured on a batch, with the model left as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from lightning_revlib.nn.meter import MemoryMeter
from lightning_revlib.nn.sequence import CoupledSequential, ReversibleSequential
from lightning_revlib.nn.swap import Targets, find, put_back, record, swap


@dataclass(frozen=True)
class Report:
    """What `report` found; print it. Bytes and FLOPs are of one forward and backward of the whole model.

    `held` is what lives after forward and did not before, outputs included; `peak` is the most that
    lives during backward, parameter gradients left out. `before` is the model by ordinary autograd.
    """

    stacks: tuple[tuple[str, int, str], ...]  # path, number of steps, coupling
    held_before: int
    held_after: int
    peak_before: int
    peak_after: int
    flops_before: int
    flops_after: int

    def __str__(self) -> str:
        rows = [f"  {path or '(the model)'}: {count} steps, {coupling}" for path, count, coupling in self.stacks]
        rows += [
            f"{name}  {format_bytes(before)} -> {format_bytes(after)}   x {after / max(before, 1):.3f}"
            for name, before, after in (
                ("activations held after forward", self.held_before, self.held_after),
                ("peak during backward          ", self.peak_before, self.peak_after),
            )
        ]
        rows.append(f"FLOPs                           x {self.flops_after / max(self.flops_before, 1):.3f}")
        return "\n".join(["reversible stacks:", *rows])


def report(model: nn.Module, *inputs: Any, targets: Targets | None = None) -> Report:
    """Run `model(*inputs)` forward and backward, before and after `swap(model, targets)`, and compare.

    >>> print(report(model, batch))

    Weights, gradients, buffers, modes, classes and random states are as before when it returns.
    The loss is the sum of the model's floating-point outputs. Raises what `swap` raises.
    """
    found = find(model, targets)
    records = record(found)
    try:
        for _, module, _ in found:
            if isinstance(module, ReversibleSequential):
                module.__class__ = CoupledSequential  # type: ignore[assignment]
        before = _measure(model, inputs)
        put_back(records)
        paths = swap(model, targets)
        after = _measure(model, inputs)
        rows = [(path, model.get_submodule(path)) for path in paths]
        listed = tuple((path, len(m), ", ".join(map(str, m.couplings))) for path, m in rows)  # type: ignore[arg-type]
    finally:
        put_back(records)
    return Report(listed, before[0], after[0], before[1], after[1], before[2], after[2])


def _measure(model: nn.Module, inputs: Any) -> tuple[int, int, int]:
    """Bytes held after forward, peak bytes in backward, FLOPs."""
    inputs = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, inputs)
    with _untouched(model), torch.enable_grad(), MemoryMeter() as meter:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        before = meter.live
        outputs = [y for y in tree_leaves(model(*inputs)) if isinstance(y, Tensor) and y.requires_grad]
        if not outputs:
            raise ValueError(f"report: no output of {type(model).__name__} requires grad; unfreeze a parameter")
        held = meter.live - before
        grads = [torch.ones_like(y) for y in outputs]
        meter.reset_peak()
        torch.autograd.backward(outputs, grads)
        peak = meter.peak - before
    # A run of its own: the counter's hooks keep tensors alive.
    with _untouched(model), torch.enable_grad(), FlopCounterMode(display=False) as flops:
        outputs = [y for y in tree_leaves(model(*inputs)) if isinstance(y, Tensor) and y.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    return held, peak, flops.get_total_flops()


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    with torch.random.fork_rng():
        try:
            for p, _ in grads:
                p.grad = None
            for m, name, b in buffers:
                m._buffers[name] = copy.deepcopy(b)
            yield
        finally:
            for p, grad in grads:
                p.grad = grad
            for m, name, b in buffers:
                m._buffers[name] = b


def format_bytes(count: int) -> str:
    """Bytes in the unit that suits them: 1536 -> "1.5 KiB"."""
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1024:
        value, unit = value / 1024, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
