"""A device with streams, played on the CPU: what would run at the same time runs in turn, and races are found.

Each stream counts what it does, and knows how much of the others' work it has waited for. An operation races if a
tensor that it reads was written, or one that it writes was used, by work of another stream that its own has not waited
for; and so does the first operation of a stream that gets memory which another may still be using.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_revlib.nn import CoupledSequential
from lightning_revlib.nn.treatments.selective import written
from tests.nn.conditions import CONDITIONS, Case
from tests.nn.test_matrix import errors


class Stream:
    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: dict[Stream, int] = {self: 0}  # how much of each stream's work is done when this one goes on
        self.freed: dict[Stream, int] = {}  # work of others that may use memory of this one's pool

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.seen)

    def record_event(self) -> dict[Stream, int]:
        return dict(self.seen)

    def wait_event(self, event: dict[Stream, int]) -> None:
        for stream, count in event.items():
            self.seen[stream] = max(count, self.seen.get(stream, 0))

    def has_seen(self, uses: dict[Stream, int]) -> bool:
        return all(self.seen.get(stream, 0) >= count for stream, count in uses.items())


class Storage:
    def __init__(self, owner: Stream) -> None:
        self.owner, self.writes = owner, dict[Stream, int]()
        self.reads: dict[Stream, int] = {}


class Device(TorchDispatchMode):
    """Stands in for `torch.cuda`; active, it finds the races among operations."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = Stream("main"), Stream("side")
        self.current = self.main
        self.known: dict[int, Storage] = {}
        self.races: list[str] = []
        self.work = {"main": 0, "side": 0}

    def current_stream(self, device: Any = None) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        now = self.current
        now.seen[now] += 1
        self.work[now.name] += 1
        changed = [self._storage(t) for t in written(func, args, kwargs)]
        given = [self._storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for storage in given:
            if not now.has_seen(storage.writes):
                self.races.append(f"{func} on {now.name} reads what it has not waited for")
            storage.reads[now] = now.seen[now]
        for storage in changed:
            if not now.has_seen({s: n for s, n in storage.reads.items() if s is not now}):
                self.races.append(f"{func} on {now.name} writes what others may be reading")
            storage.writes = {now: now.seen[now]}
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.known:
                if not now.has_seen(now.freed):
                    self.races.append(f"{func} on {now.name} gets memory that others may be using")
                now.freed = {}
                self._storage(t).writes = {now: now.seen[now]}
        return out

    def _storage(self, t: Tensor) -> Storage:
        memory = t.untyped_storage()
        if memory._cdata not in self.known:
            self.known[memory._cdata] = Storage(self.current)
            weakref.finalize(memory, self._free, memory._cdata)
        return self.known[memory._cdata]

    def _free(self, key: int) -> None:
        storage = self.known.pop(key)
        for stream, count in {**storage.reads, **storage.writes}.items():
            if stream is not storage.owner:
                storage.owner.freed[stream] = max(count, storage.owner.freed.get(stream, 0))


def compare_on(device: Device, cls: type[nn.Module], coupling: dict[str, Any], condition: str) -> None:
    """A condition of the matrix: the stack of this class gives what ordinary autograd gives, and has no races."""
    results = []
    for each in (CoupledSequential, cls):
        torch.manual_seed(3)
        with device if each is cls else nullcontext():
            found = CONDITIONS[condition](Case(each, coupling, torch.float64, autocast=False))
        results.append([*found, torch.rand(1)])
    assert max(errors(*results)) < 1e-12
    assert not device.races, device.races[:3]
