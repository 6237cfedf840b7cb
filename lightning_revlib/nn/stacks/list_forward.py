"""One forward through a list whose layers a model calls: the streams, and what the model was handed of them."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_revlib.nn.state.base import version
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.run import Run


class ListForward:
    """One forward through a list, whose layers from number `index` on are called one by one.

    Without a `run`, layers run by ordinary autograd.
    """

    def __init__(self, index: int, a: Tensor, b: Tensor, run: Run | None) -> None:
        self.index = index  # of the layer that is due
        self.a, self.b, self.run = a, b, run
        self._handed: Any = None
        self._versions: tuple[int, int] | None = None  # of that, and of stream a, which the model was handed before
        self._guard: Any = None  # the hook that tells if something else reads it

    @property
    def handed(self) -> Any:
        """What the model was handed last."""
        return self._handed

    def step(self, step: Step, compiler: Any) -> None:
        """Run a step of the layer that is due."""
        if self.run is None:
            self.a, self.b = step.run(self.a, self.b, compiler)
        else:
            self.a, self.b = self.run.step(step, self.a, self.b)

    def hand(self, dtype: torch.dtype, name: str) -> Tensor:
        """Return stream b for the model: a node of its own in the graph, which gets gradients only if it is read.

        `name` is that of the layer which has run.
        """
        b = self.b
        self._handed = b.to(dtype) if b.dtype is not dtype else b.view_as(b) if self.run else b
        self._versions = version(self._handed), version(self.a)
        if self.run is not None and self.run.rebuilds and self._handed.requires_grad:
            self._guard = self._handed.register_hook(partial(_read_between, name))
        return self._handed

    def next_layer(self) -> None:
        """Note that a layer has run."""
        self.index += 1

    def continues_with(self, x: Any) -> bool:
        """Return whether x is what was handed out. It may have passed through hooks, as FSDP's, which get gradients.

        Raises RuntimeError if x was modified in place.
        """
        handed, guard = self._handed, self._guard
        if x is not handed and not (isinstance(x, Tensor) and same_memory(x, handed)):
            return False
        self._handed = self._guard = None
        if x is not handed:
            if guard is not None:
                guard.remove()
            # its value is b's, exactly, its gradient is x's
            self.b = x if x.dtype is self.b.dtype else x.to(self.b.dtype) + (self.b - x.to(self.b.dtype)).detach()
        if (version(x), version(self.a)) != self._versions:
            raise RuntimeError(
                f"a hidden state of shape {list(x.shape)} was modified in place between two layers of a reversible"
                " list, where later layers still need it; modify a copy, as in total = h.clone() for total = h"
            )
        return True


def same_memory(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are one, but for their place in the graph."""
    return (
        (x.shape, x.stride(), x.dtype, x.storage_offset()) == (y.shape, y.stride(), y.dtype, y.storage_offset())
        and x.device == y.device
        and x.untyped_storage()._cdata == y.untyped_storage()._cdata
    )


def _read_between(name: str, grad: Tensor) -> None:
    raise RuntimeError(
        f"what {name} returned is also used by something else than the next layer, as in a feature pyramid, a loss on"
        " hidden states, a skip connection over layers, or a model that leaves the list early: each of them would"
        " stay in memory, and the list cannot be swapped; detach what is read, or undo the swap by restore(model)"
    )


def describe(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _caches(call: Any) -> list[Any]:
    args, kwargs = call
    return [value for value in (*args, *kwargs.values()) if hasattr(value, "get_seq_length")]


def has_cache(call: Any, path: str) -> bool:
    """Return whether the call brings a cache that is not empty: layers are stored then, as they would append twice."""
    if not (found := any(cache.get_seq_length() for cache in _caches(call))):
        return False
    warnings.warn(f"{path}: gradients with a cache that is not empty: activations are stored", stacklevel=5)
    return found


def without_cache(call: Any, path: str) -> Any:
    """Return the call without an empty cache, which would keep all keys and values, and get them twice."""
    caches = _caches(call)
    if not caches:
        return call
    warnings.warn(f"{path}: the cache stays empty if gradients are recorded; pass use_cache=False", stacklevel=5)
    args, kwargs = call
    dropped = {id(cache) for cache in caches}
    return (
        tuple(None if id(value) in dropped else value for value in args),
        {name: None if id(value) in dropped else value for name, value in kwargs.items()},
    )
