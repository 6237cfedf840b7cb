"""Count bytes and FLOPs at dispatch. Counts are exact and the same on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lightning_revlib.nn.compilation import EagerMode

ROWS, COLUMNS = (Tensor.crow_indices, Tensor.col_indices), (Tensor.ccol_indices, Tensor.row_indices)
COMPRESSED = {torch.sparse_csr: ROWS, torch.sparse_bsr: ROWS, torch.sparse_csc: COLUMNS, torch.sparse_bsc: COLUMNS}
GATHER = "fsdp::split_with_sizes_copy"  # FSDP2's operator that writes the weights it has gathered


class MemoryMeter(EagerMode):
    """A context manager that counts the bytes of the storages allocated while it is active.

    >>> with MemoryMeter() as meter:
    ...     y = stack(x)
    ...     held = meter.live                      # bytes allocated since then and not yet freed
    ...     meter.reset_peak()
    ...     y.backward(g)
    >>> held / y.nbytes, meter.peak / y.nbytes

    Storages allocated before, such as inputs and parameters, do not count, but for the weights that FSDP2 gathers along
    their first dimension from several processes. Views add nothing. Execution is eager, also of compiled code, and
    takes two to four times as long. The scratch memory of kernels is not counted: for it, use
    `torch.cuda.max_memory_allocated`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known: dict[int, Any] = {}  # finalizers
        self._gathered: dict[int, Any] = {}  # weak references to storages

    @property
    def live(self) -> int:
        """The bytes allocated so far and not yet freed."""
        self.notice_resharding()
        return self._live

    def notice_resharding(self) -> None:
        """Count as freed the gathered weights that FSDP2 has freed, by resizing storages, which no mode sees."""
        for key, reference in list(self._gathered.items()):
            storage = reference()
            if storage is not None and storage.nbytes():
                continue
            del self._gathered[key]
            if storage is not None and (uncount := self._known.get(key)):  # else its finalizer has run
                uncount()

    def reset_peak(self) -> None:
        """Set the peak to the bytes that are alive now."""
        self.peak = self.live

    def forget_gradient(self, parameter: Tensor) -> None:
        """Stop counting the gradient of a parameter, as a hook for `register_post_accumulate_grad_hook`."""
        for tensor in tensors_in(parameter.grad):
            if uncount := self._known.get(storage_key(tensor)):
                uncount()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.notice_resharding()
        out = func(*args, **(kwargs or {}))
        if func.name() == GATHER:
            self._note_gathered(kwargs["out"])
        unknown = {key: t for t in tensors_in(out) if (key := storage_key(t)) not in self._known}
        if unknown:
            given = {storage_key(t) for t in tensors_in([args, kwargs])}
            for key, tensor in unknown.items():
                if key not in given:
                    self._count(tensor, key)
        return out

    def _count(self, tensor: Tensor, key: int) -> None:
        storage = storage_of(tensor)
        size = storage.nbytes()
        self._live += size
        self.peak = max(self.peak, self._live)
        self._known[key] = weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        del self._known[key]
        self._live -= size

    def _note_gathered(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            key = storage_key(tensor)
            self._gathered[key] = weakref.ref(storage_of(tensor))
            if key not in self._known:
                self._count(tensor, key)


class ActivationMeter(MemoryMeter):
    """Counts no gathered weights, which are parameters."""

    def _note_gathered(self, tensors: Sequence[Tensor]) -> None:
        for uncount in [self._known.get(storage_key(tensor)) for tensor in tensors]:
            if uncount is not None:
                uncount()


class CostMeter(MemoryMeter):
    """Counts FLOPs, too, as `FlopCounterMode` does but without its hooks on modules, which keep tensors alive."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if (count := flop_registry.get(getattr(func, "_overloadpacket", func))) is not None:
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


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among the arguments or results of an operation, in a third of the time that pytree takes.

    Of a sparse tensor, they are its indices and values, as it has no storage itself.
    """
    if isinstance(value, Tensor):
        if value.layout is torch.sparse_coo:
            yield from (value._indices(), value._values())
        elif value.layout in COMPRESSED:
            outer, inner = COMPRESSED[value.layout]
            yield from (outer(value), inner(value), value.values())
        else:
            yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)


def storage_key(tensor: Tensor) -> int:
    """Return a number that tensors have in common if they share a storage."""
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
