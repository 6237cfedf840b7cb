"""Plain attributes of modules, such as rates and flags, which their owner may set between forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_not
from typing import Any

from torch import nn

from lightning_revlib.nn.state.attributes import ABSENT, PLAIN, set_attributes
from lightning_revlib.nn.state.base import Call, State


class Settings(State):
    """The plain attributes of all modules when a forward ended, training flags among them."""

    shared = True
    __slots__ = ("authored", "changed", "modules", "then")

    def __init__(self, call: Call) -> None:
        self.modules, self.authored = call.modules, call.authored
        self.changed: dict[nn.Module, dict[str, Any]] = {}  # former values, ABSENT for those that were not there

    def close(self) -> bool:
        # Those of authored modules without tensors, whose graph may refer to a frame, and the frame to this.
        self.then = [vars(m).copy() if m not in self.authored else _plain(vars(m)) for m in self.modules]
        return True

    def is_current(self) -> bool:
        self.changed = {}
        for m, then in zip(self.modules, self.then, strict=True):
            now = vars(m)
            # Most modules are as they were. `map` compares their attributes without a line of Python for each.
            if len(now) != len(then) or any(map(is_not, now.values(), then.values())):
                former, current = _plain(then), _plain(now)
                if former != current:
                    self.changed[m] = dict.fromkeys(current, ABSENT) | former
        return not self.changed

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        changed = [(vars(m), self.changed[m]) for m in modules if m in self.changed]
        now = [(own, {name: own.get(name, ABSENT) for name in former}) for own, former in changed]
        set_attributes(changed)
        try:
            yield
        finally:
            set_attributes(now)


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if type(value) in PLAIN}
