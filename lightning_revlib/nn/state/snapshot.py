"""Running a model without changing it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_revlib.nn.state.attributes import PLAIN


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Put back at the end gradients, buffers, random states, and attributes that are plain values or generators.

    Parameters have no gradient inside.
    """
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    ready = [m for m in model.modules() if not isinstance(m, LazyModuleMixin)]  # lazy ones get sizes
    plain = [(m, name, x) for m in ready for name, x in m.__dict__.items() if isinstance(x, PLAIN)]
    generators = {x for m in model.modules() for x in m.__dict__.values() if isinstance(x, torch.Generator)}
    states = [(generator, generator.get_state()) for generator in generators]
    devices = {p.device for p, _ in grads if p.is_cuda}
    if torch.cuda.is_initialized():  # of blocks without parameters
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
            for m, name, x in plain:
                m.__dict__[name] = x
            for generator, state in states:
                generator.set_state(state)
