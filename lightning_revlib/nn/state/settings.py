"""Plain attributes of modules, such as rates and flags, which their owner may set between forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lightning_revlib.nn.state.attributes import PLAIN, changed_values
from lightning_revlib.nn.state.base import Call, State
from lightning_revlib.nn.state.entries import swapped

OBJECT: Any = object()  # stands for an attribute that is not plain: it may be a tensor, whose graph refers to a frame


class Settings(State):
    """The plain attributes of all modules when a forward ended, training flags among them."""

    shared = True
    __slots__ = ("authored", "changed", "modules", "scripted", "then")

    def __init__(self, call: Call) -> None:
        self.modules, self.authored = call.modules, call.authored
        self.changed: dict[nn.Module, dict[str, Any]] = {}  # former values, ABSENT for those that were not there

    def close(self) -> bool:
        self.then = [self._attributes(m).copy() for m in self.modules]
        self.scripted = {m: m.training for m in self.modules if "training" not in vars(m)}  # whose flag is in C++
        return True

    def is_current(self) -> bool:
        pairs = zip(self.modules, self.then, strict=True)
        self.changed = {m: former for m, then in pairs if (former := changed_values(self._attributes(m), then))}
        return not self.changed and all(m.training == flag for m, flag in self.scripted.items())

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        with ExitStack() as undo:
            for m in self.scripted.keys() & set(modules):
                undo.callback(setattr, m, "training", m.training)
                m.training = self.scripted[m]
            former = [(vars(m), self.changed[m]) for m in modules if m in self.changed]
            undo.enter_context(swapped((own, name, value) for own, values in former for name, value in values.items()))
            yield

    def _attributes(self, m: nn.Module) -> dict[str, Any]:
        """Return a module's attributes, of an authored one the plain ones."""
        own = vars(m)
        return {k: v if isinstance(v, PLAIN) else OBJECT for k, v in own.items()} if m in self.authored else own
