"""One layer that its model calls: what stands in for its forward, and what passes between two of them.

A `ReversibleModuleList` owns them; see there.
"""

from __future__ import annotations

import inspect
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_revlib.nn.state.parameters import version
from lightning_revlib.nn.treatments.run import Execution

if TYPE_CHECKING:
    from lightning_revlib.nn.stacks.module_list import Layerwise


class Layer:
    """Stands in for the forward of one layer: an attribute of the object, so that its class and its hooks stay."""

    def __init__(self, owner: Layerwise, module: nn.Module) -> None:
        self.owner, self.module = owner, module
        self.inner: Any = module.__dict__.get("forward")  # another's stand-in

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.owner.call if torch.compiler.is_exporting() else self.owner.call_eagerly
        return call(self, args, kwargs)

    def original(self) -> Any:
        return self.inner or partial(type(self.module).forward, self.module)

    def first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The stream and the other arguments; it may be given by name."""
        if args:
            return args[0], args[1:], kwargs
        name = next(iter(inspect.signature(self.original()).parameters), "")
        if name not in kwargs:
            raise TypeError(f"{self.owner._name(self.module)} was called without its first argument, the stream")
        return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


class Run:
    """One forward through a list: the streams, and what the model was handed of them."""

    def __init__(self, index: int) -> None:
        self.index = index  # of the layer that is due
        self.execution: Execution | None = None  # without, ordinary operations
        self.a: Tensor
        self.b: Tensor
        self.handed: Any = None
        self.counts: tuple[int, int]  # the versions of that and of stream a, which the model was handed before
        self.guard: Any = None

    def hand(self, dtype: torch.dtype, name: str) -> Tensor:
        """Stream b for the model: in a graph, a node of its own, through which gradients come only if it is read."""
        b = self.b
        self.handed = b.to(dtype) if b.dtype is not dtype else b.view_as(b) if self.execution else b
        self.counts = version(self.handed), version(self.a)
        if self.execution and self.execution.recording and self.handed.requires_grad:
            self.guard = self.handed.register_hook(partial(_read_between, name))
        return self.handed

    def continues_with(self, x: Any) -> bool:
        """Whether x is what was handed out, maybe passed through hooks as FSDP's, which then get their gradients."""
        handed, guard = self.handed, self.guard
        self.handed = self.guard = None
        if x is handed:
            pass
        elif isinstance(x, Tensor) and same_memory(x, handed):
            if guard is not None:
                guard.remove()
            # its value is b's, exactly, its gradient is x's
            self.b = x if x.dtype is self.b.dtype else x.to(self.b.dtype) + (self.b - x.to(self.b.dtype)).detach()
        else:
            self.handed = handed
            return False
        if (version(x), version(self.a)) != self.counts:
            raise RuntimeError(
                f"a hidden state of shape {list(x.shape)} was modified in place between two layers of a reversible"
                " list, where later layers still need it; modify a copy, as in total = h.clone() for total = h"
            )
        return True


def same_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are one, but for their place in the graph."""
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


def cached(call: Any, path: str) -> bool:
    """Whether the call brings keys and values of before: then the layers are stored, as they would append twice."""
    if not (cached := any(cache.get_seq_length() for cache in _caches(call))):
        return False
    warnings.warn(f"{path}: gradients with a cache that is not empty: activations are stored", stacklevel=5)
    return cached


def without_cache(call: Any, path: str) -> Any:
    """The call without an empty cache: it would keep all layers' keys and values, and a second run append to it."""
    caches = _caches(call)
    if not caches:
        return call
    warnings.warn(f"{path}: the cache stays empty where gradients are recorded; pass use_cache=False", stacklevel=5)
    args, kwargs = call
    dropped = {id(cache) for cache in caches}
    return (
        tuple(None if id(value) in dropped else value for value in args),
        {name: None if id(value) in dropped else value for name, value in kwargs.items()},
    )
