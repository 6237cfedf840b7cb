"""The cost of a step, counted while it runs once by itself. Counts are the same on every machine, process and day."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_revlib.nn.coupling.base import has_gaps
from lightning_revlib.nn.meter import CostMeter
from lightning_revlib.nn.plan.cost import RunStep
from lightning_revlib.nn.state.context import autocast_kind
from lightning_revlib.nn.state.entries import swapped
from lightning_revlib.nn.state.parameters import named_parameters
from lightning_revlib.nn.state.preserve import preserve_state
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.base import TREATMENTS, StepCost


class Prices(NamedTuple):
    """What other work costs, as the number of FLOPs that a processor does in the same time."""

    byte: int  # to write one
    operation: int  # to start one
    python_dispatch: int  # to start one after a dispatch mode in Python, as in selective checkpointing


CPU = Prices(10, 100_000, 500_000)
# A GPU in half precision: fitted to store, checkpoint and selective checkpointing, docs/measurements/cuda.md.
DEVICE = Prices(500, 4 * 10**9, 14 * 10**9)


def measure(step: Step, treatment: str, a: Tensor, b: Tensor, *, last: bool, run: RunStep) -> StepCost:
    """Return what a step costs, counted while `run` runs it forward and backward, with its hooks. See `CostModel`.

    The streams and the step's module are left as they were. The gradient of the `last` step's output is held by others
    during backward.
    """
    module, arguments = step.module, [t for t in step.arguments() if t.requires_grad]
    with ExitStack() as undo:
        parameters = _without_hooks(module, undo)
        seed = torch.zeros((), device=a.device, requires_grad=True)
        with preserve_state(module), torch.enable_grad(), _Meter(a.device) as meter:
            outputs = run(*_Entry.apply(seed, a.detach(), b.detach(), (a.requires_grad, b.requires_grad)))
            given: list[Tensor] = []
            end = _Exit.apply(given if last else None, *outputs)
            del outputs
            held, forward = meter.live - end.nbytes, meter.peak
            meter.run_backward(end, [seed, *parameters, *arguments])
            given.clear()
            work = meter.work(TREATMENTS[treatment].dispatches_in_python)
            # Of the arguments' gradients, those of later steps wait for these.
            backward = meter.peak + (0 if last else sum(t.nbytes for t in arguments))
            return StepCost(held, forward, backward, work, meter.live - end.nbytes)


def _without_hooks(module: nn.Module, undo: ExitStack) -> list[nn.Parameter]:
    """Lend a module parameters with the same values and without users' hooks, until `undo`; return these and its own.

    Its own are among them, as modules such as nn.LSTM hold them in lists, too. The gradients of all count no bytes.
    """
    own = [p for p in module.parameters() if p.is_leaf and p.requires_grad]
    lent = {id(p): nn.Parameter(p.detach()) for p in own if type(p) is nn.Parameter}
    named = named_parameters([m for m in module.modules() if isinstance(m._parameters, dict)])
    for p in own:
        if id(p) in lent:
            vars(lent[id(p)]).update(vars(p))  # attributes that a user has given it
    undo.enter_context(swapped((m._parameters, name, lent[id(p)]) for m, name, p in named if id(p) in lent))
    parameters = [*lent.values(), *own]
    for p in parameters:
        undo.callback(p.register_hook(_shrunk).remove)
    return parameters


def measure_loss(loss: Callable[[Tensor], Tensor], hidden: Tensor, head: nn.Module) -> StepCost:
    """Return what a loss of hidden states costs, counted while it runs forward and backward, as a step of its own.

    Of the gradients of the head's parameters those count that live beside the ones that stay. All is left as it was.
    """
    parameters = [p for p in head.parameters() if p.is_leaf and p.requires_grad]
    with preserve_state(head), torch.enable_grad(), _Meter(hidden.device) as meter:
        start = hidden.detach().requires_grad_(hidden.requires_grad)
        value = loss(start)
        forward = meter.peak
        meter.run_backward(value, [t for t in (start, *parameters) if t.requires_grad])
        backward = meter.peak - sum(p.nbytes for p in parameters)
    # Outputs of stacks live all the while.
    return StepCost(0, 0, max(forward, backward), meter.work(in_python=False), 0)


class _Meter(CostMeter):
    """Counts bytes written and operations, too. Bytes count on devices of one kind only."""

    written = operations = 0

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return super().__torch_dispatch__(func, types, args, kwargs)

    def run_backward(self, end: Tensor, wanted: list[Tensor]) -> None:
        """Compute gradients, and count the peak from here on."""
        self.reset_peak()
        if end.requires_grad:
            with torch.autocast(autocast_kind(self.device), enabled=False):  # backward is called outside of it
                torch.autograd.grad(end, wanted, allow_unused=True)

    def work(self, in_python: bool) -> int:
        """Return the work in FLOPs."""
        prices = CPU if self.device.type == "cpu" else DEVICE
        done = self.flops + prices.byte * self.written
        started = self.operations * (prices.python_dispatch if in_python else prices.operation)
        # A device works while the host starts operations.
        return done + started if self.device.type == "cpu" else max(done, started)

    def _count(self, tensor: Tensor, key: int) -> None:
        if tensor.device.type != self.device.type:
            return
        super()._count(tensor, key)
        self.written += tensor.untyped_storage().nbytes()


class _Entry(torch.autograd.Function):
    """Makes streams like those that another step returns: no leaves, which a graph would keep alive."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, a: Tensor, b: Tensor, needs_grad: tuple[bool, bool]) -> Any:
        # Views with gaps are parts of the stack's input, which its caller holds.
        streams = tuple(t.view_as(t) if has_gaps(t) else t.clone() for t in (a, b))
        ctx.mark_non_differentiable(*[t for t, needed in zip(streams, needs_grad, strict=True) if not needed])
        return streams

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return torch.zeros(()), None, None, None


class _Exit(torch.autograd.Function):
    """Makes gradients like those that a later step returns: held by nothing else, unless put into the list `given`."""

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
    """Return one number in place of a parameter's gradient, which does not count."""
    return torch.zeros_like(grad) if grad.is_sparse else grad.new_zeros(()).expand_as(grad)
