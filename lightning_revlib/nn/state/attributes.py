"""Plain attributes of modules: numbers, flags, texts and None, such as a counter or a data-dependent initialisation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import is_not
from typing import Any, TypeAlias

from torch import Tensor, nn

from lightning_revlib.nn.state.base import Call, State
from lightning_revlib.nn.state.torch_layers import is_torch_layer

PLAIN = (bool, int, float, str, type(None))
ABSENT: Any = object()
Values: TypeAlias = Sequence[tuple[dict[str, Any], dict[str, Any]]]  # attributes of modules, and values for some


class Snapshot:
    """All attributes of some modules at a time, of which the plain ones can be told and put back."""

    __slots__ = ("before",)

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.before = [(vars(m), vars(m).copy()) for m in modules]

    def changes(self) -> Values:
        """Return the plain values that are others now, and ABSENT for those that were not there."""
        # Most modules change nothing. `map` compares all their attributes without a line of Python for each.
        touched = [(o, b) for o, b in self.before if len(o) != len(b) or any(map(is_not, o.values(), b.values()))]
        found = []
        for own, before in touched:
            former = {name: before.get(name, ABSENT) for name in own.keys() | before.keys()}
            former = {name: value for name, value in former.items() if _is_other(value, own.get(name, ABSENT))}
            if former:
                found.append((own, former))
        return found

    def put_back(self) -> None:
        set_attributes(self.changes())


class Attributes(State):
    """The plain attributes that a block's call changes, adds or deletes, as they were before the call.

    A container among the attributes stays as it is; `TensorAttributes` has the tensors. Torch's own layers change none,
    but the block that has them may set theirs.
    """

    __slots__ = ("before", "changed")

    def __init__(self, call: Call) -> None:
        self.before: Snapshot | None = Snapshot(call.modules)
        self.changed: Values = []

    @classmethod
    def concerns(cls, modules: Sequence[nn.Module]) -> bool:
        return not all(map(is_torch_layer, modules))

    def close(self) -> bool:
        assert self.before is not None
        self.changed, self.before = self.before.changes(), None
        return bool(self.changed)

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        now = [(own, {name: own.get(name, ABSENT) for name in former}) for own, former in self.changed]
        set_attributes(self.changed)
        try:
            yield
        finally:
            set_attributes(now)


def set_attributes(values: Values) -> None:
    """Give attributes of modules these values; ABSENT deletes one."""
    for own, attributes in values:
        for name, value in attributes.items():
            if value is ABSENT:
                own.pop(name, None)
            else:
                own[name] = value


def _is_other(before: Any, now: Any) -> bool:
    """Return whether a plain attribute has changed. One that was added counts if it is plain, or a tensor."""
    if before is ABSENT:
        return isinstance(now, (*PLAIN, Tensor)) and now is not None
    return isinstance(before, PLAIN) and (type(now) is not type(before) or now != before)
