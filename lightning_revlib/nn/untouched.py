"""Running a model without leaving a trace in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers and random states are put back at the end; parameters have no gradient inside."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    devices = {p.device for p, _ in grads if p.is_cuda}
    if torch.cuda.is_initialized():  # where blocks without parameters run
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    with torch.random.fork_rng(devices):
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
