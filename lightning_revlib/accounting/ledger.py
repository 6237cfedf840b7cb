"""A `MemoryMeter` that notes of each storage when it was allocated and freed, in which module and by what operation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_revlib.accounting.owners import CASTS, GATHERED, Owner
from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.meter import MemoryMeter, storage_key, storage_of, tensors_in

CAST = torch.ops.aten._to_copy.default  # what autocast does to a weight


@dataclass(slots=True)
class Entry:
    """A storage that was allocated. Times count allocations and frees; a storage takes memory while born <= t < freed.

    `owner` is set if it is known by the tensor and not by the place.
    """

    size: int
    born: int
    place: str | None
    operation: str
    owner: Owner | None = None
    freed: int | None = None


class Ledger(MemoryMeter):
    """Counts as `MemoryMeter` does, and keeps an entry of each storage that it counts.

    Args:
        where: returns the path of the module that is running.
        parameters: those whose casts are told apart.
    """

    def __init__(self, where: Callable[[], str | None], parameters: list[Tensor]) -> None:
        super().__init__()
        self.where, self.time, self.entries = where, 0, list[Entry]()
        self._parameters = {storage_key(p) for p in parameters}
        self._open: dict[int, Entry] = {}
        self._before: dict[int, Any] = {}  # finalizers of storages that were there before
        self._call: tuple[Any, Any] = None, ()

    def note_existing(self, tensors: Any, owner: Owner) -> None:
        """Have entries of storages that exist already, which `live` and `peak` do not count."""
        for tensor in tensors_in(pytree.tree_leaves(tensors)):
            if (key := storage_key(tensor)) not in self._before:
                storage = storage_of(tensor)
                entry = Entry(storage.nbytes(), 0, None, "", owner)
                self.entries.append(entry)
                self._before[key] = weakref.finalize(storage, self._free_existing, key, entry)

    def close(self) -> None:
        """Note no more frees, for which storages refer to this."""
        for known in (*self._known.values(), *self._before.values()):
            known.detach()

    def assign(self, tensors: Any, owner: Owner) -> None:
        """Say whose the storages of tensors are, from their birth, if they were counted."""
        for tensor in tensors_in(pytree.tree_leaves(tensors)):
            if (entry := self._open.get(storage_key(tensor))) is not None:
                entry.owner = owner

    def alive(self) -> list[Entry]:
        """Return the entries of storages that have not been freed."""
        return list(self._open.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._call = func, args
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._call = None, ()  # which would keep the arguments alive

    def _count(self, tensor: Tensor, key: int) -> None:
        super()._count(tensor, key)
        func, args = self._call
        self.time += 1
        entry = Entry(storage_of(tensor).nbytes(), self.time, self.where(), str(getattr(func, "overloadpacket", func)))
        if func is CAST and ((cast := storage_key(args[0])) in self._parameters or cast in self._gathered):
            entry.owner = Owner(CASTS)
        self.entries.append(entry)
        self._open[key] = entry

    def _note_gathered(self, tensors: Sequence[Tensor]) -> None:
        super()._note_gathered(tensors)
        self.assign(tensors, Owner(GATHERED))

    def _free(self, key: int, size: int) -> None:
        super()._free(key, size)
        self.time += 1
        self._open.pop(key).freed = self.time

    def _free_existing(self, key: int, entry: Entry) -> None:
        self.time += 1
        entry.freed = self.time
        del self._before[key]
