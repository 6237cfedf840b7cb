"""One forward through a list whose layers a model calls: the streams, and what the model was handed of them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from lightning_revlib.nn.state.tensors import version
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.run import Run


class ListForward:
    """One forward through a list, whose layers from number `index` on are called one by one.

    Without a `run`, layers run by ordinary autograd.
    """

    def __init__(self, index: int, a: Tensor, b: Tensor) -> None:
        self.index, self.steps = index, 0  # number of the layer that is due, and of its first step
        self.a, self.b = a, b
        self.run: Run | None = None
        self.is_ordinary = False  # to its end
        self.handed: Any = None  # what the model was handed last
        self._versions: tuple[int, int] | None = None  # of that, and of stream a, which the model was handed before

    def record(self, run: Run) -> None:
        """Go on by a run."""
        self.run = run

    def stay_ordinary(self) -> None:
        """Go on by ordinary autograd, whatever the next layers get."""
        self.is_ordinary = True

    def step(self, step: Step, compiler: Any) -> None:
        """Run a step of the layer that is due."""
        if self.run is None:
            self.a, self.b = step.run(self.a, self.b, compiler)
        else:
            self.a, self.b = self.run.step(step, self.a, self.b)
        self.steps += 1

    def hand(self, dtype: torch.dtype) -> Tensor:
        """Return stream b for the model, which may read it, or leave the list here."""
        if self.run is not None:
            self.run.pause(self.a, self.b)
        self.handed = self.b if self.b.dtype is dtype else self.b.to(dtype)
        self._versions = version(self.handed), version(self.a)
        return self.handed

    def next_layer(self) -> None:
        """Note that a layer has run."""
        self.index += 1

    def continues_with(self, x: Any) -> bool:
        """Return whether x is what was handed out, perhaps after it has passed through hooks, as FSDP's.

        The gradient of the next layer passes through x. Raises RuntimeError if x was modified in place.
        """
        if x is not self.handed and not (isinstance(x, Tensor) and same_memory(x, self.handed)):
            return False
        self.handed = None
        if x.dtype is self.b.dtype:
            self.b = x
        else:
            self.b = _Through.apply(x, self.b) if x.requires_grad else self.b.detach()
        if (version(x), version(self.a)) != self._versions:
            raise RuntimeError(
                f"a hidden state of shape {list(x.shape)} was modified in place between two layers of a reversible"
                " list, where later layers still need it; modify a copy, as in total = h.clone() for total = h"
            )
        return True


class _Through(torch.autograd.Function):
    """Return the stream b, with a gradient that passes through x, which is b in another dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return b.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad.to(ctx.dtype), None


def same_memory(x: Tensor, y: Tensor) -> bool:
    """Return whether two tensors are one, but for their place in the graph."""
    return (
        (x.shape, x.stride(), x.dtype, x.storage_offset()) == (y.shape, y.stride(), y.dtype, y.storage_offset())
        and x.device == y.device
        and x.untyped_storage()._cdata == y.untyped_storage()._cdata
    )


def describe(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length")


def has_cache(args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> bool:
    """Return whether the call brings a cache that is not empty: layers are stored then, as they would append twice."""
    if not any(_is_cache(value) and _is_filled(value) for value in (*args, *kwargs.values())):
        return False
    warnings.warn(f"{path}: gradients with a cache that is not empty: activations are stored", stacklevel=5)
    return True


def _is_filled(cache: Any) -> bool:
    try:
        return bool(cache.get_seq_length())
    except ValueError:  # of linear attention only, as Mamba's, which has a state instead
        return bool(cache.has_previous_state())


def without_cache(args: tuple[Any, ...], kwargs: dict[str, Any], path: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the call without an empty cache, which would keep all keys and values, and get them twice."""
    if not any(map(_is_cache, (*args, *kwargs.values()))):
        return args, kwargs
    warnings.warn(f"{path}: the cache stays empty if gradients are recorded; pass use_cache=False", stacklevel=5)
    kept = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
    return tuple(None if _is_cache(value) else value for value in args), kept
