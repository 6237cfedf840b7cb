"""Tensors among the attributes of modules, such as style weights that their owner sets before each forward."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType

import torch
from torch import Tensor, nn

from lightning_revlib.nn.state.attributes import ABSENT, Values, set_attributes
from lightning_revlib.nn.state.base import Call, State, StateError, brief, version, without_graph
from lightning_revlib.nn.state.parameters import modified

# Types that most attributes of modules have. A look at the types of all takes a third of the time of one at each.
_OTHERS = frozenset({bool, int, float, str, type(None), dict, OrderedDict, set, list, tuple, torch.Size, FunctionType})


class TensorAttributes(State):
    """The tensors among a block's attributes before its call; what the call sets instead is left for the next call."""

    __slots__ = ("tensors",)

    def __init__(self, call: Call) -> None:
        self.tensors: list[tuple[nn.Module, str, Tensor, int]] = []  # with their versions
        for m in call.modules:
            own = vars(m)
            if not _OTHERS.issuperset(map(type, own.values())):
                found = [(name, t) for name, t in own.items() if isinstance(t, Tensor)]
                self.tensors += [(m, name, without_graph(t), version(t)) for name, t in found]

    def close(self) -> bool:
        for m, name, t, count in self.tensors:
            if version(t) != count:
                raise StateError(
                    f"attribute {name!r} of {brief(m)} is changed in place by its own call, which backward has to run"
                    f" again; make it a buffer, as in register_buffer({name!r}, ...), which is put back"
                )
        return bool(self.tensors)

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        for m, name, t, count in self.tensors:
            if version(t) != count:
                raise modified(f"attribute {name!r} of {brief(m)}")
        now: Values = [(vars(m), {name: vars(m).get(name, ABSENT)}) for m, name, _, _ in self.tensors]
        set_attributes([(vars(m), {name: t}) for m, name, t, _ in self.tensors])
        try:
            yield
        finally:
            set_attributes(now)
