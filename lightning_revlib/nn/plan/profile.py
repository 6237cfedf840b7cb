"""The cost of a step, counted while it runs once by itself. Counts are the same on every machine, process and day."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lightning_revlib.nn.coupling.base import has_gaps
from lightning_revlib.nn.meter import MemoryMeter
from lightning_revlib.nn.state.snapshot import preserve_state
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.base import TREATMENTS, StepCost


class Prices(NamedTuple):
    """FLOPs that a processor does meanwhile."""

    byte: int  # while one is written
    operation: int  # while one is started
    python_dispatch: int  # while one is started that Python looks at first, as in selective checkpointing


CPU = Prices(10, 100_000, 500_000)
# A GPU in half precision: from what store, checkpoint and selective checkpointing took on one, docs/cuda.md.
DEVICE = Prices(500, 4 * 10**9, 14 * 10**9)


def measure(
    step: Step,
    treatment: str,
    a: Tensor,
    b: Tensor,
    *,
    last: bool,
    run: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
) -> StepCost:
    """Return what a step costs, counted while `run` runs it forward and backward, with its hooks. See `CostModel`.

    The streams and the step's module are as before when this returns. Somebody else holds the gradient of the output
    of the `last` step.
    """
    module = step.module
    parameters = [p for p in module.parameters() if p.is_leaf and p.requires_grad]
    hooks = [p.register_hook(_shrunk) for p in parameters]
    try:
        seed = torch.zeros((), device=a.device, requires_grad=True)
        with preserve_state(module), torch.enable_grad(), _Meter(a.device.type) as meter:
            outputs = run(*_Entry.apply(seed, a.detach(), b.detach(), (a.requires_grad, b.requires_grad)))
            given: list[Tensor] = []
            end = _Exit.apply(given if last else None, *outputs)
            del outputs
            held, forward = meter.live - end.nbytes, meter.peak
            meter.reset_peak()
            if end.requires_grad:
                within = torch.is_autocast_enabled(meter.kind)  # backward is called outside of it
                with torch.autocast(meter.kind, enabled=False) if within else nullcontext():
                    torch.autograd.grad(end, [seed, *parameters], allow_unused=True)
            given.clear()
            work = meter.work(TREATMENTS[treatment].dispatches_in_python)
            return StepCost(held, forward, meter.peak, work, meter.live - end.nbytes)
    finally:
        for hook in hooks:
            hook.remove()


class _Meter(MemoryMeter):
    """Counts FLOPs, bytes written and operations, as `FlopCounterMode` does but without its hooks on modules.

    Bytes count on one kind of device: those of the host do not, if it is another.
    """

    flops = written = operations = 0

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.operations += 1
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out

    def work(self, in_python: bool) -> int:
        """Return the work in FLOPs. A host starts operations while its device does others."""
        prices = CPU if self.kind == "cpu" else DEVICE
        done = self.flops + prices.byte * self.written
        started = self.operations * (prices.python_dispatch if in_python else prices.operation)
        return done + started if self.kind == "cpu" else max(done, started)

    def _count(self, storage: torch.UntypedStorage, key: int) -> None:
        if storage.device.type != self.kind:
            return
        super()._count(storage, key)
        self.written += storage.nbytes()


class _Entry(torch.autograd.Function):
    """Streams as a former step would put them out: no leaves, which a graph would keep alive."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, a: Tensor, b: Tensor, needs_grad: tuple[bool, bool]) -> Any:
        # Views with gaps are of the stack's input, which is there anyway.
        streams = tuple(t.view_as(t) if has_gaps(t) else t.clone() for t in (a, b))
        ctx.mark_non_differentiable(*[t for t, needed in zip(streams, needs_grad, strict=True) if not needed])
        return streams

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return torch.zeros(()), None, None, None


class _Exit(torch.autograd.Function):
    """Gradients as a later step would hand them down: tensors that nobody else refers to, unless they are `given`."""

    @staticmethod
    def forward(ctx: Any, given: list[Tensor] | None, *tensors: Tensor) -> Tensor:
        ctx.given = given
        ctx.like = [(t.shape, t.dtype, t.device) for t in tensors]
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grads = [torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like]
        if ctx.given is not None:
            ctx.given.extend(grads)
        return None, *grads


def _shrunk(grad: Tensor) -> Tensor:
    """Replace a parameter's gradient, which does not count, by one number."""
    return grad.new_zeros(()).expand_as(grad)
