"""Parameters without gradient, which a block's own call may move, as a codebook by a moving average of its input."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from lightning_revlib.nn.state.base import Call, State, StateError, brief
from lightning_revlib.nn.state.buffers import changes_silently, is_known_to_keep
from lightning_revlib.nn.state.entries import swapped
from lightning_revlib.nn.state.parameters import Lent, is_frozen, value_then
from lightning_revlib.nn.state.tensors import version
from lightning_revlib.nn.state.torch_layers import is_torch_layer


class Frozen(State):
    """The former values of parameters without gradient that a block's call moves. A second run moves copies of them.

    Copies are made before the call, but not of most torch layers', nor if an earlier call of the module with the same
    flags has moved nothing: weights may be large.
    """

    __slots__ = ("former", "met", "part", "read", "values")

    def __init__(self, call: Call) -> None:
        self.met: list[tuple[nn.Module, str, Any, int, Tensor | None]] = []  # with their versions, and perhaps copies
        for m in call.modules:
            for name, p in m._parameters.items():
                if is_frozen(p):
                    self.met.append(
                        (m, name, p, version(p), p.detach().clone() if may_move(m, name, call.part) else None)
                    )
        self.read: list[tuple[nn.Module, str, Any, int]] = []
        self.former: list[tuple[nn.Module, str, Tensor]] = []
        self.values, self.part = call.former, call.part

    @classmethod
    def concerns(cls, call: Call) -> bool:
        return any([is_frozen(p) for m in call.modules for p in m._parameters.values()])

    def close(self) -> bool:
        for m, name, p, count, before in self.met:
            is_same = version(p) == count
            if before is None and not is_same:
                raise StateError(
                    f"parameter {name!r} of {brief(m)} requires no gradient and is changed in place by its block's"
                    " call, which backward has to run again; make it a buffer of your own module, which is put back"
                )
            if before is None or (is_same and not changes_silently(m, name, m.training, before, p, self.part)):
                self.read.append((m, name, p, count))
            else:
                self.former.append((m, name, before))
                self.values[id(p), count] = p, before
        self.met = []
        return True

    def restore(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        read = [
            (m, name, p, value_then(p, count, self.values, "parameter", name, m)) for m, name, p, count in self.read
        ]
        former = self.former + [(m, name, then) for m, name, p, then in read if then is not p]
        return swapped((m._parameters, name, Lent(t.clone(), requires_grad=False)) for m, name, t in former)


def may_move(m: nn.Module, name: str, part: str) -> bool:
    """Return whether a call may move the module's parameter, as far as its class and earlier calls tell."""
    is_table = isinstance(m, nn.Embedding)  # which a vector quantiser moves from outside
    if is_torch_layer(m) and not is_table:
        return False
    return (is_table and m.max_norm is not None) or not is_known_to_keep(m, name, part)
