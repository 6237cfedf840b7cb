"""Count bytes and FLOPs at dispatch. Counts are exact and the same on every machine."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry
from typing_extensions import Self

from lightning_revlib.nn.internals import TorchDispatchMode, pytree


class MemoryMeter(TorchDispatchMode):
    """A context manager that counts the bytes of the storages allocated while it is active.

    >>> with MemoryMeter() as meter:
    ...     y = stack(x)
    ...     held = meter.live                      # bytes allocated since then and not yet freed
    ...     meter.reset_peak()
    ...     y.backward(g)
    >>> held / y.nbytes, meter.peak / y.nbytes

    Storages allocated before, such as inputs and parameters, do not count. Views add nothing. Eager
    execution takes two to four times as long. The scratch memory of kernels is not counted: use
    `torch.cuda.max_memory_allocated` for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __enter__(self) -> Self:  # torch's has no type
        super().__enter__()
        return self

    def reset_peak(self) -> None:
        """Set the peak to the bytes that are alive now."""
        self.peak = self.live

    def forget_gradient(self, parameter: Tensor) -> None:
        """Stop counting the gradient of a parameter, as a hook for `register_post_accumulate_grad_hook`."""
        if parameter.grad is not None and (known := self._known.get(_key(parameter.grad))):
            known()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_key(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := _key(tensor)) not in given and key not in self._known:
                self._count(tensor, key)
        return out

    def _count(self, tensor: Tensor, key: int) -> None:
        storage = storage_of(tensor)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


class CostMeter(MemoryMeter):
    """Counts FLOPs, too, as `FlopCounterMode` does but without its hooks on modules, which keep tensors alive."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


class ColumnMeter(MemoryMeter):
    """Counts tensors with a certain number of columns alone."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def _count(self, tensor: Tensor, key: int) -> None:
        if tensor.shape[-1:] == (self.columns,):
            super()._count(tensor, key)


def _key(tensor: Tensor) -> int:
    return storage_of(tensor)._cdata


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Return a tensor's storage; of a DTensor, that of the shard that this process has."""
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor.untyped_storage()
    with torch.no_grad():
        return to_local().untyped_storage()


def format_bytes(count: int) -> str:
    """Return the count with its unit, such as "1.5 KiB" for 1536."""
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while value >= 1024:
        value, unit = value / 1024, next(units)
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
