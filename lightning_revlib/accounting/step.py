"""`memory`: one counted training step, and the bytes of each of its moments by owner. The model is left as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_revlib.accounting.optimizer import make_state, preserve_optimizer
from lightning_revlib.accounting.recorder import Recorder
from lightning_revlib.accounting.result import Memory
from lightning_revlib.nn.convert.call import judged
from lightning_revlib.nn.convert.swap import stacks
from lightning_revlib.nn.state.snapshot import preserve_state


class Program(NamedTuple):
    """A training step: `run(batch)` returns a loss, or an output that has one."""

    model: nn.Module
    run: Callable[[Any], Any]
    batch: Any
    optimizer: Optimizer | None


def memory(
    step: Callable[..., Any],
    batch: Any,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    *,
    model: nn.Module | None = None,
) -> Memory:
    """Run one training step, and return the bytes of its four moments by owner.

    >>> print(memory(model, batch, torch.optim.AdamW))
    >>> print(memory(hugging_face_model, tokenizer(texts, return_tensors="pt"), optimizer))
    >>> print(memory(lambda batch: loss_fn(model(batch[0]), batch[1]), batch, optimizer, model=model))

    The step is one of many: the optimizer has its state, memory budgets have their plans. Weights, gradients, buffers,
    the optimizer's state and options, and random states are as before when it returns. Counts are those of
    `MemoryMeter`: exact, and the same on every machine; the scratch memory of kernels is not counted.

    Args:
        step: a module, called with the batch, with its entries if it is a mapping or a tuple; a LightningModule, whose
            `training_step` is called; or a function of the batch. Backward begins with the loss: what it returns, the
            attribute or entry `loss` of that, or else the sum of its floating-point tensors.
        batch: the step's argument.
        optimizer: an optimizer, or a function that makes one of parameters; None for a step without.
        model: the module that a function trains.

    Raises:
        ValueError: for a function without `model`, and a step without anything that requires grad.
    """
    return count(program_of(step, batch, optimizer, model))


def program_of(step: Any, batch: Any, optimizer: Any, model: nn.Module | None) -> Program:
    """Return the training step that the arguments of `memory` mean. Raises ValueError."""
    run = step
    if isinstance(step, nn.Module):
        model = step if model is None else model
        run = getattr(step, "training_step", None) or (lambda batch: _call(step, batch))
        if run == getattr(step, "training_step", None):
            training_step = run
            run = lambda batch: training_step(batch, 0)
    elif model is None and inspect.ismethod(step) and isinstance(step.__self__, nn.Module):
        model = step.__self__
    if model is None:
        raise ValueError(f"memory: which module does {step!r} train? Pass it, as in memory(step, batch, model=model)")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    return Program(model, run, batch, optimizer)


def count(program: Program) -> Memory:
    """Run the program's step once, after one that a memory budget or a grid needs, and return its bytes."""
    model, _, batch, optimizer = program
    optimizers = () if optimizer is None else (optimizer,)
    with preserve_state(model), torch.enable_grad(), preserve_optimizer(optimizer):
        if any(each.budget is not None or each.grid_bits == "auto" for each in stacks(model).values()):
            _run(program, Recorder(model))
        if optimizer is not None and not optimizer.state:
            make_state(optimizer)
        return _run(program, Recorder(model, batch, *optimizers))


def _run(program: Program, recorder: Recorder) -> Memory:
    """Run forward, backward, and the optimizer, watched."""
    model, run, batch, optimizer = program
    with recorder:
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
    raise ValueError(f"memory: no output of {type(model).__name__} requires grad; unfreeze a parameter")


def _call(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(*batch) if isinstance(batch, (tuple, list)) else module(batch)
