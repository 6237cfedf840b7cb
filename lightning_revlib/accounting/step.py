"""One training step of a program, counted. The model and the optimizer are left as they were."""

from __future__ import annotations

import inspect
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_revlib.accounting.optimizer import drop_state, make_state, needs_closure, preserve_optimizer
from lightning_revlib.accounting.recorder import Recorder
from lightning_revlib.accounting.result import Memory
from lightning_revlib.nn.convert.call import judged
from lightning_revlib.nn.convert.swap import preserve_stacks, stacks
from lightning_revlib.nn.plan.unshard import fsdp_modules
from lightning_revlib.nn.state.preserve import preserve_state


class Program(NamedTuple):
    """A training step: `run(batch)` returns a loss, or an output that has one."""

    model: nn.Module
    run: Callable[[Any], Any]
    batch: Any
    optimizer: Optimizer | None


def program_of(step: Any, batch: Any, optimizer: Any, model: nn.Module | None) -> Program:
    """Return the training step that the arguments of `memory` mean. Raises ValueError, TypeError."""
    run = step
    if isinstance(step, nn.Module):
        model, run = model or step, _run_of(step)
    elif model is None and inspect.ismethod(step) and isinstance(step.__self__, nn.Module):
        model = step.__self__
    if model is None:
        raise ValueError(f"memory: which module does {step!r} train? Pass it, as in memory(step, batch, model=model)")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        if not callable(optimizer):
            given = " ".join(reprlib.repr(optimizer).split())  # in one line
            raise TypeError(
                f"memory: optimizer={given}: pass an optimizer, or a function that makes one of"
                " parameters, such as torch.optim.AdamW; of several optimizers, count the step of each by itself"
            )
        optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    if optimizer is not None and needs_closure(optimizer):
        raise TypeError(
            f"memory: {type(optimizer).__name__} runs forward and backward several times in its step, by a closure, and"
            " is not counted; leave the optimizer out"
        )
    for module in fsdp_modules(model):  # FSDP2 leaves weights gathered after a forward without backward
        module.reshard()
    return Program(model, run, batch, optimizer)


def _run_of(module: nn.Module) -> Callable[[Any], Any]:
    """Return the function of a batch that trains a module."""
    training_step: Any = getattr(module, "training_step", None)

    def train(batch: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*self.log.*self.trainer.*")  # there need not be one
            return training_step(batch, 0)

    def run(batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return module(**batch)
        return module(*batch) if isinstance(batch, (tuple, list)) else module(batch)

    return run if training_step is None else train  # of a LightningModule


def count(program: Program) -> Memory:
    """Run the program's step once, after those that a grid and a memory budget need, and return its bytes."""
    model, _, batch, optimizer = program
    optimizers = () if optimizer is None else (optimizer,)
    with (
        preserve_stacks(stacks(model).values()),  # the grid that is chosen, and the measured drift
        preserve_state(model),
        torch.enable_grad(),
        preserve_optimizer(optimizer),
        _forward_in(model) as precision,
    ):
        found = stacks(model).values()
        if any(each.grid_bits == "auto" for each in found):
            _run(program, Recorder(model), precision)
        if any(each.budget is not None for each in found):
            _run(program, Recorder(model), precision)
        if optimizer is None or optimizer.state:
            return _run(program, Recorder(model, batch, *optimizers), precision)
        make_state(optimizer)
        memory = _run(program, recorder := Recorder(model, batch, *optimizers), precision)
        if drop_state(optimizer, [p for p in model.parameters() if p not in recorder.trained]):
            memory = _run(program, Recorder(model, batch, *optimizers), precision)
        return memory


def _run(program: Program, recorder: Recorder, precision: Any) -> Memory:
    """Run forward, backward, and the optimizer, watched."""
    model, run, batch, optimizer = program
    with recorder:
        with precision():
            out = run(batch)
        losses = losses_of(out, model)
        del out  # as trainers do, which keep the loss alone
        recorder.end("forward")
        torch.autograd.backward(losses, [torch.ones_like(y) for y in losses])
        recorder.end("backward")
        if optimizer is not None:
            optimizer.step()
        recorder.end("optimizer")
        del losses
        for p in model.parameters():
            p.grad = None
    return recorder.result()


def losses_of(out: Any, model: nn.Module) -> list[Tensor]:
    """Return the tensors at which backward begins. Raises ValueError if there is none."""
    found = [out["loss"]] if isinstance(out, Mapping) and "loss" in out else judged(out)
    if losses := [y for y in found if y.requires_grad]:
        return losses
    if not found:
        raise ValueError(
            f"memory: the step returned {type(out).__name__} and no loss; return it as a tensor, and leave backward and"
            " the optimizer's step to memory"
        )
    raise ValueError(f"memory: no output of {type(model).__name__} requires grad; unfreeze a parameter")


@contextmanager
def _forward_in(model: nn.Module) -> Iterator[Callable[[], Any]]:
    """Turn autocast off inside, and yield a function that makes a context with autocast as it was, for the forward.

    Backward then runs outside of all contexts of autocast, as in a Trainer. Within one, the casts of weights that a
    checkpoint makes anew would be kept.
    """
    kind = next((p.device.type for p in model.parameters()), "cpu")
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        yield ExitStack
        return
    dtype, depth = torch.get_autocast_dtype(kind), torch.autocast_increment_nesting()
    for _ in range(depth):
        torch.autocast_decrement_nesting()
    torch.set_autocast_enabled(kind, False)
    try:
        yield lambda: torch.autocast(kind, dtype)
    finally:
        torch.set_autocast_enabled(kind, True)
        for _ in range(depth - 1):
            torch.autocast_increment_nesting()
