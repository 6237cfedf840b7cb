"""What one step of a stack takes under one treatment: bytes and work, counted, not timed, and hence repeatable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from lightning_revlib.nn.coupling.base import has_gaps
from lightning_revlib.nn.coupling.standard import Invertible
from lightning_revlib.nn.engine.drift import Sentinel
from lightning_revlib.nn.meter import MemoryMeter
from lightning_revlib.nn.plan.fingerprint import description
from lightning_revlib.nn.plan.unshard import gathered
from lightning_revlib.nn.stacks.options import Treatment
from lightning_revlib.nn.state.snapshot import untouched
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.prefetch import has_streams


class Prices(NamedTuple):
    """FLOPs that a processor does meanwhile."""

    byte: int  # while one is written
    operation: int  # while one is started
    selection: int  # while one is started that Python looks at first, as in selective checkpointing


CPU = Prices(10, 100_000, 500_000)
# A GPU in half precision: from what store, checkpoint and selective checkpointing took on one, docs/cuda.md.
DEVICE = Prices(500, 4 * 10**9, 14 * 10**9)
FLOPS_A_CARRIED_BYTE = 8_000  # to the host or back; with it, not after it


class Figures(NamedTuple):
    """Bytes that live beside the stack's output and other steps', and the work of forward and backward."""

    held: int  # between forward and backward
    forward: int  # at most in forward, the streams before and after included
    backward: int  # at most in backward, the gradients of the streams and what was held included
    work: int
    kept: int = 0  # behind backward, by further outputs that somebody holds


class Measured(NamedTuple):
    """One step: its streams' bytes as they come in, those of a drift sentinel, and its figures by treatment."""

    streams: int
    sentinel: int
    figures: Mapping[Treatment, Figures]


class Measuring:
    """The figures of a stack's steps, in order; a step that is like one before it is not counted again.

    `alone(step, treatment, last, a, b)` runs one step by itself.
    """

    def __init__(self, stack: Any, alone: Callable[..., tuple[Tensor, ...]]) -> None:
        self.stack, self.alone = stack, alone
        self.steps: list[Measured] = []
        self._known: dict[Any, dict[Treatment, Figures]] = {}

    def add(self, step: Step, a: Tensor, b: Tensor, *, last: bool) -> None:
        streams = [(t.shape, t.stride(), t.requires_grad) for t in (a, b)]
        kind = (last, *streams, *description(step))
        if kind not in self._known:
            with gathered(step.module):
                self._known[kind] = {
                    treatment: self._measure(step, treatment, a, b, last)
                    for treatment in self._possible(step, a.device)
                }
            figures = self._known[kind]
            if "offload" in figures:
                figures["offload"] = carried(figures["offload"], figures["store"])
            undone = figures.get("reversible")
            if undone and (not last or self.stack.split_dim is not None):
                # What comes out, and is held, are the next step's streams, or the output.
                figures["reversible"] = undone._replace(held=undone.held - a.nbytes - b.nbytes)
        self.steps.append(Measured(a.nbytes + b.nbytes, Sentinel.bytes(a), self._known[kind]))

    def _measure(self, step: Step, treatment: Treatment, a: Tensor, b: Tensor, last: bool) -> Figures:
        run = partial(self.alone, step, treatment, last)
        try:
            figures = measure(run, step.module, a, b, last=last, selective=treatment == "selective")
            return figures if step.extra is not None else figures._replace(kept=0)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise RuntimeError(
                f"{step.name} calls torch.utils.checkpoint with use_reentrant=True, and memory_budget="
                f"{self.stack.budget.value!r} cannot measure that; pass use_reentrant=False there"
            ) from None
        finally:
            step.extra = None  # until then it is held, as it will be by the caller

    def _possible(self, step: Step, device: torch.device) -> list[Treatment]:
        block = not isinstance(step.coupling, Invertible)
        can: dict[Treatment, bool] = {
            "reversible": step.coupling.invertible(self.stack.training),
            "checkpoint": block,
            "selective": block and self.stack.context_fn is None,
            "offload": block and self.stack.offload and has_streams(device),
            "store": True,
        }
        return [treatment for treatment in can if can[treatment]]


def measure(
    run: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    module: nn.Module,
    a: Tensor,
    b: Tensor,
    *,
    last: bool,
    selective: bool,
) -> Figures:
    """The figures of `run`, which does a step with `module` on streams like a and b, whose tensors are not touched.

    `last`: what it returns is the stack's output, whose gradient somebody else holds.

    The module runs forward and backward, with its hooks, and is as before when this returns.
    """
    parameters = [p for p in module.parameters() if p.is_leaf and p.requires_grad]
    hooks = [p.register_hook(_shrunk) for p in parameters]
    try:
        seed = torch.zeros((), device=a.device, requires_grad=True)
        with untouched(module), torch.enable_grad(), _Meter(a.device.type) as meter:
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
            return Figures(held, forward, meter.peak, meter.work(selective), meter.live - end.nbytes)
    finally:
        for hook in hooks:
            hook.remove()


def carried(offload: Figures, store: Figures) -> Figures:
    """Of a step whose neighbours are offloaded, too: what these are on their way with, and the time it takes."""
    moved = store.held - offload.held
    return Figures(
        offload.held,
        offload.forward + moved,
        offload.backward + moved,
        max(store.work, 2 * moved * FLOPS_A_CARRIED_BYTE),
        offload.kept,
    )


class _Meter(MemoryMeter):
    """Counts FLOPs, as `FlopCounterMode` does but without its hooks on modules, bytes written and operations.

    Of one kind of device: on another, the host's, bytes do not count.
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

    def work(self, selective: bool) -> int:
        """In FLOPs; a host starts operations while its device does others."""
        prices = CPU if self.kind == "cpu" else DEVICE
        done = self.flops + prices.byte * self.written
        started = self.operations * (prices.selection if selective else prices.operation)
        return done + started if self.kind == "cpu" else max(done, started)

    def _count(self, storage: torch.UntypedStorage, key: int) -> None:
        if storage.device.type != self.kind:
            return
        super()._count(storage, key)
        self.written += storage.nbytes()


class _Entry(torch.autograd.Function):
    """Streams as a former step would put them out: no leaves, which a graph would keep alive.

    Views with gaps are of the stack's input, which is there anyway.
    """

    @staticmethod
    def forward(ctx: Any, seed: Tensor, a: Tensor, b: Tensor, needs_grad: tuple[bool, bool]) -> Any:
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
    """In the place of a parameter's gradient, which does not count: one number."""
    return grad.new_zeros(()).expand_as(grad)
