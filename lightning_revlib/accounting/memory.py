"""`memory`: where the bytes of a training step go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_revlib.accounting.advice import advise
from lightning_revlib.accounting.result import Memory
from lightning_revlib.accounting.simulate import simulated
from lightning_revlib.accounting.step import count, program_of


def memory(
    step: Callable[..., Any],
    batch: Any,
    optimizer: Optimizer | Callable[[Any], Optimizer] | None = None,
    *,
    model: nn.Module | None = None,
    simulate: bool = False,
    device: torch.device | str | None = None,
    advice: bool = True,
) -> Memory:
    """Run one training step, and return the bytes of its four moments by owner, and what would save most of them.

    >>> print(memory(model, batch, torch.optim.AdamW))
    >>> print(memory(lambda batch: loss_fn(model(batch[0]), batch[1]), batch, optimizer, model=model))
    >>> with torch.device("meta"):  # of a model that need not fit
    ...     model, batch = LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     print(memory(model, batch, torch.optim.AdamW, simulate=True))

    The step is one of many: the optimizer has its state, memory budgets have their plans, and the loss is all that is
    left of forward's output. Autocast that is active is active in forward, as in a Trainer. Weights, gradients,
    buffers, the optimizer's state and options, and random states are as before when it returns. Counts are those of
    `MemoryMeter`: exact, and the same on every machine. Not counted are scratch memory of kernels, what the allocator
    reserves, DDP's buckets, and buffers within collectives.

    Args:
        step: a module, called with the batch, or with its entries if it is a mapping or a tuple; a LightningModule,
            whose `training_step` is called; or a function of the batch. Backward begins with the loss: what it returns,
            the attribute or entry `loss` of that, or else the sum of its floating-point tensors.
        batch: the step's argument.
        optimizer: an optimizer, or a function that makes one of parameters; None for a step without.
        model: the module that a function trains.
        simulate: compute shapes only, by fake tensors, without memory and arithmetic. The model may be on the meta
            device. Sequences of transformers' models are taken to be not packed, and an attention mask to have padding.
            Shards of FSDP2 are simulated, too, in a release of torch whose collectives take fake tensors.
        device: that simulated tensors are said to be on; without, where they are, or "cpu" if on the meta device.
        advice: count what changes would save, by simulation.

    Raises:
        ValueError: for a function without `model`, and a step without anything that requires grad.
        TypeError: for another optimizer; for a simulated step that reads values, by ``.item()`` or a mask, say, or has
            an operator without shapes.
    """
    program = program_of(step, batch, optimizer, model)
    if simulate:
        with simulated(program, device) as fake:
            result = count(fake)
    else:
        result = count(program)
    return dataclasses.replace(result, advice=advise(program, result, device)) if advice else result
