"""The tensors among a call's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn

from lightning_revlib.nn.state.base import NOTHING, Call, State, StateError
from lightning_revlib.nn.state.tensors import version, without_graph


class Arguments(State):
    """The tensors among a call's arguments, which must stay as they were before the call."""

    __slots__ = ("versions",)

    def __init__(self, call: Call) -> None:
        self.versions = [(without_graph(t), version(t)) for t in call.arguments]

    def close(self) -> bool:
        for t, count in self.versions:
            if version(t) != count:
                raise StateError(
                    f"an argument of shape {list(t.shape)} is changed in place by the call, which backward has to run"
                    " again on the same; use the operation that is not in-place, or treatment 'store' for this block"
                )
        return bool(self.versions)

    def restore(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        for t, count in self.versions:
            if version(t) != count:
                raise StateError(
                    f"an argument of shape {list(t.shape)} has been modified in place since the call, by the model or a"
                    " later block, and backward has to run this block on it again; pass the one that is modified to its"
                    " block alone, by `layerwise`, or modify a copy"
                )
        return NOTHING
