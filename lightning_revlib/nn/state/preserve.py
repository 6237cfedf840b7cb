"""Running a model without changing it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lightning_revlib.nn.compilation import EagerMode
from lightning_revlib.nn.internals import parametrization_cache, use_parametrization_cache
from lightning_revlib.nn.state.attributes import Snapshot, attributes_of
from lightning_revlib.nn.state.entries import swapped
from lightning_revlib.nn.state.frozen import may_move
from lightning_revlib.nn.state.parameters import ORDINARY, Lent, is_frozen, named_parameters
from lightning_revlib.nn.state.tensors import without_graph, written


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Put back at the end gradients, buffers, random states, hooks, and attributes, but not what is in objects.

    Parameters have no gradient inside. Those that forward changes in place are put back; those without gradient that
    their block's own call may move are copies. Compiled code runs eagerly.
    """
    modules = list(model.modules())
    with torch.random.fork_rng(_devices(model)), ExitStack() as undo:
        if (cache := parametrization_cache()) is not None:
            undo.enter_context(use_parametrization_cache({key: without_graph(t) for key, t in cache.items()}))
        undo.callback(torch.clear_autocast_cache)  # torch 2.8 keeps casts of weights that have no gradient
        settled = [m for m in modules if not isinstance(m, LazyModuleMixin)]  # lazy ones get sizes, and lose a hook
        undo.callback(Snapshot(settled).put_back)
        for value in [value for m in settled for value in vars(m).values() if type(value) in (dict, OrderedDict, list)]:
            undo.callback(_put_back, value, value.copy())  # hooks among them
        tensors = attributes_of(modules, Tensor)
        undo.enter_context(swapped((vars(m), name, without_graph(t)) for m, name, t in tensors))
        for _, _, generator in attributes_of(modules, torch.Generator):
            undo.callback(generator.set_state, generator.get_state())
        for p in model.parameters():
            undo.callback(setattr, p, "grad", p.grad)
            p.grad = None
        moving = [(m, name, p) for m, name, p in named_parameters(modules) if is_frozen(p) and may_move(m, name, "")]
        codebooks = [(m._parameters, name, Lent(p.detach().clone(), requires_grad=False)) for m, name, p in moving]
        undo.enter_context(swapped(codebooks))
        for m in modules:
            before = dict(m._buffers.items())
            undo.callback(_put_back, m._buffers, before)
            for name, buffer in before.items():
                if buffer is not None:
                    m._buffers[name] = copy.deepcopy(buffer) if is_lazy(buffer) else buffer.detach().clone()
        undo.enter_context(_KeepValues(p for p in model.parameters() if type(p) in ORDINARY and not is_lazy(p)))
        yield


class _KeepValues(EagerMode):
    """Puts back at the end what operations change in place of some tensors.

    Each tensor is copied to the host before its first change.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.data = [(t, t.detach()) for t in tensors]  # may be exchanged, too
        self.unchanged: dict[int | None, list[Tensor]] = {}  # by storage
        for t, data in self.data:
            self.unchanged.setdefault(data.untyped_storage()._cdata, []).append(t)
        self.copies: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in written(func, args, kwargs or {}):
            key = t.untyped_storage()._cdata if t.layout is torch.strided else None
            for each in self.unchanged.pop(key, ()):
                self.copies.append((each, each.detach().to("meta" if each.is_meta else "cpu", copy=True)))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for t, data in self.data:
            if t.untyped_storage()._cdata != data.untyped_storage()._cdata:
                t.data = data
        for t, before in self.copies:
            t.detach().copy_(before)


def _put_back(entries: Any, before: Any) -> None:
    """Put back what was in a list, a dict, or what a scripted module has instead of one."""
    if isinstance(entries, list):
        entries[:] = before
        return
    for key in [key for key, _ in entries.items() if key not in before]:
        del entries[key]
    for key, value in before.items():
        entries[key] = value


def _devices(model: nn.Module) -> set[torch.device]:
    devices = {p.device for p in model.parameters() if p.is_cuda}
    if torch.cuda.is_initialized():  # of blocks without parameters
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return devices
