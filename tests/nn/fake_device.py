"""A device with streams, played by the CPU: work that could overlap runs in turn, and races are found.

`play` replaces the functions of torch through which a library learns of a device: `torch.accelerator`'s
`current_accelerator`, `torch.get_device_module`, and `torch.empty` for pinned memory. The library is not patched.

Each stream counts its operations, and knows how many of every other stream's are done when its own next one begins. An
operation races if it reads a tensor that another stream wrote, or writes one that another stream used, and its own
stream has not waited for that. The first operation of a stream that gets memory which another stream may still be
using races, too.

`leave_out` shows that the tests above can fail: it runs the same once for each wait, without that wait.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_revlib.nn import CoupledSequential
from tests.nn.conditions import CONDITIONS, Case
from tests.nn.test_matrix import errors


class Stream:
    def __init__(self, device: Device, name: str) -> None:
        self.device, self.name = device, name
        self.seen: dict[Stream, int] = {self: 0}  # operations of each stream that are done when this one goes on
        self.freed: dict[Stream, int] = {}  # operations of others that may use memory of this one's pool

    def wait_stream(self, other: Stream) -> None:
        self.device.wait(self, dict(other.seen))

    def wait_event(self, event: Event) -> None:
        self.device.wait(self, event.seen)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.seen = dict(self.seen)
        return event

    def has_seen(self, uses: dict[Stream, int]) -> bool:
        return all(self.seen.get(stream, 0) >= count for stream, count in uses.items())


class Event:
    def __init__(self) -> None:
        self.seen: dict[Stream, int] = {}


class Storage:
    def __init__(self, owner: Stream) -> None:
        self.owner = owner
        self.writes: dict[Stream, int] = {}
        self.reads: dict[Stream, int] = {}


class Device(TorchDispatchMode):
    """Stands in for `torch.cuda`; active as a dispatch mode, it finds the races among operations."""

    def __init__(self, without: Collection[int] = ()) -> None:
        super().__init__()
        self.without = without  # numbers of waits that do nothing
        self.waits: list[str] = []  # the place in the library of each
        self.main = self.current = Stream(self, "main")
        self.known: dict[int, Storage] = {}
        self.pinned: list[int] = []  # bytes of host memory, by allocation
        self.races: list[str] = []
        self.work: Counter[str] = Counter()  # operations, by stream

    def Stream(self, device: Any = None, priority: int = 0) -> Stream:
        return Stream(self, "side")

    def Event(self, **_: Any) -> Event:
        return Event()

    def current_stream(self, device: Any = None) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def wait(self, stream: Stream, seen: dict[Stream, int]) -> None:
        number, caller = len(self.waits), sys._getframe(2)
        self.waits.append(f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno} {caller.f_code.co_name}")
        if number not in self.without:
            for other, count in seen.items():
                stream.seen[other] = max(count, stream.seen.get(other, 0))

    def pin(self, like: Tensor) -> Tensor:
        """Return host memory, which meters of the device do not see."""
        self.pinned.append(like.nbytes)
        host = torch.from_numpy(np.empty(max(like.nbytes, 1), np.uint8))[: like.nbytes]
        return host.view(like.dtype).view(like.shape)

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


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Yield the arguments that an operation changes."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (t for t in tree_leaves(value) if isinstance(t, Tensor))


@contextmanager
def play(device: Device) -> Iterator[Device]:
    """Let torch say to others than itself that the CPU is this device."""
    with torch.device("cpu"):
        torch.zeros(0)  # as a device's context lists torch's functions once and for all, when it is first used
    torchs = {
        "current_accelerator": torch.accelerator.current_accelerator,
        "get_device_module": torch.get_device_module,
        "empty": torch.empty,
        "empty_like": torch.empty_like,
    }

    def current_accelerator(check_available: bool = False) -> torch.device | None:
        if called_by_torch():
            return torchs["current_accelerator"](check_available)
        return torch.device("cpu")

    @functools.wraps(torch.get_device_module)
    def get_device_module(of: Any = None) -> Any:
        if called_by_torch() or (of is not None and torch.device(of).type != "cpu"):
            return torchs["get_device_module"](of)
        return device

    def pinning(name: str) -> Callable[..., Tensor]:
        def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
            if not pin_memory:
                return torchs[name](*args, **kwargs)
            return device.pin(torchs[name](*args, **{**kwargs, "device": "meta"}))

        return empty

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
        patch.setattr(torch, "get_device_module", get_device_module)
        patch.setattr(torch, "empty", pinning("empty"))
        patch.setattr(torch, "empty_like", pinning("empty_like"))
        yield device


def called_by_torch() -> bool:
    """Return whether torch calls the function that calls this one: its compiler goes on with the CPU as it is."""
    return sys._getframe(2).f_globals["__name__"].split(".")[0] == "torch"


def compare_on(device: Device, cls: type[nn.Module], coupling: dict[str, Any], condition: str, **size: int) -> None:
    """Assert that a condition of the matrix gives what ordinary autograd gives, and has no races."""
    results = []
    for each in (CoupledSequential, cls):
        torch.manual_seed(3)
        with device if each is cls else nullcontext():
            found = CONDITIONS[condition](Case(each, coupling, torch.float64, autocast=False, **size))
        results.append([*found, torch.rand(1)])
    assert max(errors(*results)) < 1e-12
    assert not device.races, device.races[:3]


def leave_out(run: Callable[[], object]) -> dict[str, list[bool]]:
    """Return, by the place of a wait in the library, which of its calls are found as races when left out."""

    def races(*without: int) -> Device:
        torch.manual_seed(3)
        with play(Device(without)) as device, device:
            run()
        return device

    whole = races()
    assert not whole.races, whole.races[:3]
    found: dict[str, list[bool]] = defaultdict(list)
    for number, place in enumerate(whole.waits):
        found[place].append(bool(races(number).races))
    return found
