"""Plain attributes of modules, such as rates and flags, which their owner may set between forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_revlib.nn.state.attributes import ABSENT, PLAIN, set_attributes
from lightning_revlib.nn.state.base import Call, State


class Settings(State):
    """The plain attributes of all modules when a forward ended, training flags among them."""

    shared = True
    __slots__ = ("changed", "modules", "then")

    def __init__(self, call: Call) -> None:
        self.modules = call.modules
        self.changed: dict[nn.Module, dict[str, Any]] = {}  # former values, ABSENT for those that were not there

    def close(self) -> bool:
        self.then = [_plain(m) for m in self.modules]
        return True

    def is_current(self) -> bool:
        pairs = [(m, then, now) for m, then in zip(self.modules, self.then, strict=True) if (now := _plain(m)) != then]
        self.changed = {m: dict.fromkeys(now, ABSENT) | then for m, then, now in pairs}
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


def _plain(m: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(m).items() if type(value) in PLAIN}
