"""Running a model without changing it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_revlib.nn.state.attributes import Snapshot, attributes_of, set_attributes
from lightning_revlib.nn.state.base import without_graph


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
        tensors = attributes_of(modules, Tensor)
        undo.callback(set_attributes, [(vars(m), {name: t}) for m, name, t in tensors])
        set_attributes([(vars(m), {name: without_graph(t)}) for m, name, t in tensors])
        for _, _, generator in attributes_of(modules, torch.Generator):
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
