"""Attributes of modules that calls read and change: plain values, tuples, lists, dicts, tensors and generators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import Enum
from numbers import Number
from operator import is_not
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from lightning_revlib.nn.state.base import Call, State, StateError, brief
from lightning_revlib.nn.state.entries import ABSENT, Entry, put, swapped, value_of
from lightning_revlib.nn.state.parameters import modified
from lightning_revlib.nn.state.tensors import is_data, is_fake, version, without_graph, without_graphs
from lightning_revlib.nn.state.torch_layers import has_only_usual_attributes

PLAIN = (Number, numpy.generic, str, type(None), bytes, range, Enum, torch.dtype, torch.device)
GROUPS = (tuple, list, dict)  # which count as changed if they are other objects
PRESENT: Any = object()  # the value that an attribute has now


class Snapshot:
    """All attributes of some modules at a time, of which plain ones, tuples, lists and dicts can be put back.

    What is changed in a list or dict is not.
    """

    __slots__ = ("before",)

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.before = [(vars(m), vars(m).copy()) for m in modules]

    def changes(self) -> list[Entry]:
        """Return the values that are others now, and ABSENT for those that were not there."""
        return [(own, *each) for own, before in self.before for each in changed_values(own, before).items()]

    def put_back(self) -> None:
        put(self.changes())


class Attributes(State):
    """The plain attributes, tuples, lists and dicts that a block's call sets or deletes, as they were before the call.

    Of its tensors and generators all are restored: their owner may set others before backward. What the call itself
    sets instead of a tensor is left for the next call. What a call changes in a list or dict stays as it is.

    Torch's own layers change none, but the block that has them may set theirs.
    """

    __slots__ = ("before", "former", "generators", "tensors")

    def __init__(self, call: Call) -> None:
        self.before: Snapshot | None = Snapshot(call.modules)
        self.former: list[Entry] = []
        tensors = attributes_of(call.modules, Tensor)
        self.tensors = [(m, name, without_graph(t), version(t)) for m, name, t in tensors]
        found = [] if is_fake(call.stream) else attributes_of(call.modules, torch.Generator)
        self.generators = [(g, g.get_state()) for g in dict.fromkeys(g for _, _, g in found)]

    @classmethod
    def concerns(cls, call: Call) -> bool:
        return bool(call.authored)

    def close(self) -> bool:
        for m, name, t, count in self.tensors:
            if version(t) != count:
                raise StateError(
                    f"attribute {name!r} of {brief(m)} is changed in place by its own call, which backward has to run"
                    f" again; make it a buffer, as in register_buffer({name!r}, ...), which is put back"
                )
        assert self.before is not None
        self.former = [(own, name, _held(value)) for own, name, value in self.before.changes()]
        self.former += [(vars(m), name, t) for m, name, t, _ in self.tensors]
        self.generators = [(g, state) for g, state in self.generators if not torch.equal(g.get_state(), state)]
        self.before = None
        return bool(self.former or self.generators)

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        for m, name, t, count in self.tensors:
            if version(t) != count:
                raise modified(f"attribute {name!r} of {brief(m)}")
        former = [(own, name, value_of(own, name) if v is PRESENT else v) for own, name, v in self.former]
        tables: list[Any] = [table for m in modules for table in (m._modules, m._parameters) if isinstance(table, dict)]
        built = [(table, *each) for table in tables for each in table.items()]  # which the call may build again
        with ExitStack() as undo:
            for g, state in self.generators:
                undo.callback(g.set_state, g.get_state())
                g.set_state(state)
            undo.enter_context(swapped(built + former))
            yield


def changed_values(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a module that are others now, and ABSENT for those that were not there."""
    # Most modules change nothing. `map` compares all their attributes without a line of Python for each.
    if len(now) == len(before) and not any(map(is_not, now.values(), before.values())):
        return {}
    former = {name: before.get(name, ABSENT) for name in now.keys() | before.keys()}
    return {name: value for name, value in former.items() if _is_other(value, now.get(name, ABSENT))}


def attributes_of(modules: Sequence[nn.Module], kind: type) -> list[tuple[nn.Module, str, Any]]:
    """Return the attributes of a type: module, name and value."""
    unusual = [m for m in modules if not has_only_usual_attributes(m)]
    return [(m, name, value) for m in unusual for name, value in vars(m).items() if isinstance(value, kind)]


def _held(value: Any) -> Any:
    """Return a former value as a frame may hold it: PRESENT for a list or dict of objects, which may have a graph."""
    return PRESENT if isinstance(value, (list, dict)) and not is_data(value) else without_graphs(value)


def _is_other(before: Any, now: Any) -> bool:
    """Return whether an attribute has changed. One that was added may be a tensor, too."""
    if before is ABSENT:
        return isinstance(now, (*PLAIN, *GROUPS, Tensor)) and now is not None
    if isinstance(before, GROUPS):  # of tensors, perhaps
        return now is not before
    return isinstance(before, PLAIN) and (type(now) is not type(before) or now != before)
