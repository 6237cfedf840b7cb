"""What one step of a stack takes under one treatment: bytes and work, counted, not timed, and hence repeatable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from lightning_revlib.nn.meter import MemoryMeter
from lightning_revlib.nn.untouched import untouched

FLOPS_A_BYTE = (
    10  # work is FLOPs + this many for each byte written: what processors do in the time they take to move it
)


class Figures(NamedTuple):
    """Bytes that live beside the stack's output and other steps', and the work of forward and backward."""

    held: int  # between forward and backward
    forward: int  # at most in forward, the streams before and after included
    backward: int  # at most in backward, the gradients of the streams and what was held included
    work: int


def measure(
    run: Callable[[Tensor, Tensor], tuple[Tensor, ...]], module: nn.Module, a: Tensor, b: Tensor, *, last: bool
) -> Figures:
    """The figures of `run`, which does a step with `module` on streams like a and b, whose tensors are not touched.

    `last`: what it returns is the stack's output, whose gradient somebody else holds.
    The module runs forward and backward, with its hooks, and is as before when this returns.
    """
    parameters = [p for p in module.parameters() if p.is_leaf and p.requires_grad]
    hooks = [p.register_hook(_shrunk) for p in parameters]
    try:
        seed = torch.zeros((), device=a.device, requires_grad=True)
        with untouched(module), torch.enable_grad(), _Meter() as meter:
            outputs = run(*_Entry.apply(seed, a.detach(), b.detach(), (a.requires_grad, b.requires_grad)))
            given: list[Tensor] = []
            end = _Exit.apply(given if last else None, *outputs)
            del outputs
            held, forward = meter.live - end.nbytes, meter.peak
            meter.reset_peak()
            if end.requires_grad:
                torch.autograd.grad(end, [seed, *parameters], allow_unused=True)
            return Figures(held, forward, meter.peak, meter.flops + FLOPS_A_BYTE * meter.written)
    finally:
        for hook in hooks:
            hook.remove()


class _Meter(MemoryMeter):
    """Counts FLOPs, as `FlopCounterMode` does but without its hooks on modules, and bytes written."""

    flops = written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out

    def _count(self, storage: torch.UntypedStorage, key: int) -> None:
        super()._count(storage, key)
        self.written += storage.nbytes()


class _Entry(torch.autograd.Function):
    """Streams as a former step would put them out: no leaves, which a graph would keep alive."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, a: Tensor, b: Tensor, needs_grad: tuple[bool, bool]) -> Any:
        streams = a.clone(), b.clone()
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
    """In the place of a parameter's gradient, which does not count: one number."""
    return grad.new_zeros(()).expand_as(grad)
