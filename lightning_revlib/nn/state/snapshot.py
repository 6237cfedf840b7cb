"""Running a model without changing it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_revlib.nn.state.attributes import Snapshot
from lightning_revlib.nn.state.base import Call
from lightning_revlib.nn.state.rng import EMPTY
from lightning_revlib.nn.state.tensor_attributes import TensorAttributes


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Put back at the end gradients, buffers, random states, and attributes: plain values, tensors and generators.

    Parameters have no gradient inside.
    """
    modules = list(model.modules())
    with torch.random.fork_rng(_devices(model)), ExitStack() as undo:
        undo.callback(torch.clear_autocast_cache)  # torch 2.8 keeps casts of weights that have no gradient
        attributes = Snapshot([m for m in modules if not isinstance(m, LazyModuleMixin)])  # lazy ones get sizes
        undo.callback(attributes.put_back)
        undo.enter_context(TensorAttributes(Call(modules, EMPTY, (), (), {})).restore(modules))
        for generator in _generators(modules):
            undo.callback(generator.set_state, generator.get_state())
        for p in model.parameters():
            undo.callback(setattr, p, "grad", p.grad)
            p.grad = None
        for m in modules:
            for name, buffer in list(m._buffers.items()):
                if buffer is not None:
                    undo.callback(m._buffers.__setitem__, name, buffer)
                    m._buffers[name] = copy.deepcopy(buffer) if is_lazy(buffer) else buffer.detach().clone()
        yield


def _devices(model: nn.Module) -> set[torch.device]:
    devices = {p.device for p in model.parameters() if p.is_cuda}
    if torch.cuda.is_initialized():  # of blocks without parameters
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return devices


def _generators(modules: Sequence[nn.Module]) -> set[torch.Generator]:
    return {x for m in modules for x in vars(m).values() if isinstance(x, torch.Generator)}
