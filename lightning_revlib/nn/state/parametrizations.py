"""Parametrized weights that are computed once for several forwards, by `torch.nn.utils.parametrize.cached`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from lightning_revlib.nn.internals import parametrization_cache, use_parametrization_cache
from lightning_revlib.nn.state.base import Call, State
from lightning_revlib.nn.state.tensors import without_graph


class Parametrizations(State):
    """The weights of a block that were cached before its call; None if none are to be cached."""

    __slots__ = ("cached",)

    def __init__(self, call: Call) -> None:
        cache, inside = parametrization_cache(), {id(m) for m in call.modules}
        self.cached = None if cache is None else {k: without_graph(t) for k, t in cache.items() if k[0] in inside}

    @classmethod
    def concerns(cls, call: Call) -> bool:
        return any([isinstance(m, ParametrizationList) for m in call.authored])

    def restore(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        return use_parametrization_cache(self.cached)
