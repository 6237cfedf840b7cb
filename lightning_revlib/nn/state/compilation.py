"""Whether compiled blocks run eagerly, as they do while a meter counts bytes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn

from lightning_revlib.nn.compilation import eager, is_eager
from lightning_revlib.nn.state.base import NOTHING, Call, State


class Eagerness(State):
    """A forward that ran eagerly runs so again, as compiled code saves other tensors."""

    shared = True
    __slots__ = ("was_eager",)

    def __init__(self, call: Call) -> None:
        self.was_eager = is_eager()

    def is_current(self) -> bool:
        return self.was_eager == is_eager()

    def restore(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        return eager() if self.was_eager else NOTHING
