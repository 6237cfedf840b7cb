"""Copies to the host and back of what blocks save, beside the device's work.

    main   step 1 | step 2        | ... | backward 2     | backward 1
    side          | 1 to the host | ...   1 to the device |

Storages are copied whole, and once each, however many tensors of them are saved. What the block owns, parameters and
buffers, stays where it is, and so does what is small. At most, what two steps save is on the device. Side waits for
main before it begins; main waits for side before memory that side reads may be freed, and before it uses what side has
brought.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.engine import errors
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.streams import side_stream

SMALLEST = 64 * 1024  # bytes; a copy of less takes longer to begin than to make


class Transfer:
    """The copies of steps in a row: their stream, and which step's tensors backward uses."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, torch.get_device_module(device)
        self.side = side_stream(self.module, device, "copies")
        self.current: weakref.ref[OffloadedStep] | None = None  # the one whose tensors backward uses
        self.coming: weakref.ref[OffloadedStep] | None = None  # the one before it, which is on its way

    @property
    def main(self) -> Any:
        return self.module.current_stream(self.device)

    def fetch(self, step: OffloadedStep) -> None:
        """Bring a step's tensors to the device, unless they are coming, and begin with those of the step before."""
        current, coming = (None if ref is None else ref() for ref in (self.current, self.coming))
        if coming is not step:
            self._load(step)
        self.main.wait_stream(self.side)
        step.arrive()
        for other in (current, coming):
            if other is not None and other is not step and other is not step.before:
                other.drop()  # what is left was saved for an output that nobody uses
        if step.before is not None and coming is not step.before:
            self._load(step.before)
        self.current, self.coming = weakref.ref(step), None if step.before is None else weakref.ref(step.before)

    def _load(self, step: OffloadedStep) -> None:
        self.side.wait_stream(self.main)  # memory of side's pool that main has freed is no longer in use then
        step.drop()
        with self.module.stream(self.side):
            step.load(self.device)


@dataclass(slots=True)
class Carried:
    """A storage in the host's memory."""

    host: Tensor  # its bytes
    source: Tensor | None  # a tensor in it on the device, until it has been copied
    uses: int = 0  # how many tensors were saved of it
    there: Tensor | None = None  # its bytes on the device again, in backward
    left: int = 0  # how many tensors backward has not yet asked for

    def load(self, device: torch.device) -> None:
        """Begin to copy it to the device."""
        self.there = torch.empty_like(self.host, device=device, pin_memory=False)
        self.there.copy_(self.host, non_blocking=True)

    def take(self) -> Tensor | None:
        """Return its bytes on the device, which are freed when all tensors have been asked for."""
        there, self.left = self.there, self.left - 1
        if not self.left:
            self.there = None
        return there

    def drop(self) -> None:
        """Free the copy on the device."""
        self.there, self.left = None, self.uses


class OffloadedStep:
    """What autograd saves in one step; `before` is the step before it, if that is offloaded, too."""

    def __init__(self, transfer: Transfer, module: nn.Module, before: OffloadedStep | None) -> None:
        self.transfer, self.module, self.before = transfer, module, before
        self.owned: set[int] | None = None  # storages that stay
        self.carried: list[Carried] = []
        self.open: dict[tuple[int, int], Carried] = {}  # by storage and version, while they are copied
        self.sent: Any = None  # when they all are
        self.arrived = False  # on the device, in backward, and main has waited for them

    def run(self, step: Step, a: Tensor, b: Tensor, compiler: Any) -> Streams:
        """Run the step by ordinary autograd."""
        with saved_tensors_hooks(self.pack, self.unpack):
            a, b = step.run(a, b, compiler)
        self._close(step.name)
        return a, b

    def end(self) -> None:
        """Wait for the copies of the last step in a row: what follows may change and free their sources."""
        self.transfer.main.wait_stream(self.transfer.side)
        for step in filter(None, (self, self.before)):
            step.release_sources()

    def release_sources(self) -> None:
        """Release what has been copied."""
        for each in self.open.values():
            each.source = None
        self.open = {}

    @torch.compiler.disable
    def pack(self, t: Tensor) -> Any:
        storage = t.untyped_storage()
        if type(t) is not Tensor or t.device != self.transfer.device or storage.nbytes() < SMALLEST:
            return t
        if t.is_conj() or t.is_neg():  # lazy views, of which a storage alone does not tell
            return t
        if self.owned is None:
            tensors = chain(self.module.parameters(), self.module.buffers())
            self.owned = {p.untyped_storage()._cdata for p in tensors if type(p) in (Tensor, nn.Parameter)}
        if storage._cdata in self.owned:
            return t
        key = storage._cdata, t._version
        if (each := self.open.get(key)) is None:
            each = self.open[key] = self._send(t)
            self.carried.append(each)
        each.uses += 1
        return each, t.dtype, t.storage_offset(), t.shape, t.stride()

    def _send(self, t: Tensor) -> Carried:
        """Begin to copy a tensor's storage to the host."""
        transfer = self.transfer
        source = torch.empty(0, dtype=torch.uint8, device=transfer.device).set_(t.untyped_storage())
        host = host_memory(source)
        transfer.side.wait_stream(transfer.main)
        with transfer.module.stream(transfer.side):
            host.copy_(source, non_blocking=True)
        return Carried(host, t.detach())  # t refers to the graph, which refers to this

    def _close(self, name: str) -> None:
        for (_, count), each in self.open.items():
            if each.source is not None and each.source._version != count:
                raise errors.saved_modified(name, each.source.shape)
        self.drop()
        self.sent = self.transfer.side.record_event()
        if self.before is not None and self.before.open:
            self.transfer.main.wait_event(self.before.sent)
            self.before.release_sources()

    @torch.compiler.disable
    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        each, dtype, offset, shape, stride = packed
        if self.sent is None:  # the step has not ended: its block calls autograd itself
            whole = each.source
        else:
            if not self.arrived or each.there is None:
                self.transfer.fetch(self)
            whole = each.take()
        return torch.empty(0, dtype=dtype, device=whole.device).set_(whole.untyped_storage(), offset, shape, stride)

    def load(self, device: torch.device) -> None:
        """Begin to copy all storages to the device."""
        for each in self.carried:
            each.load(device)

    def arrive(self) -> None:
        """Note that main has waited for the copies on the device."""
        self.arrived = True

    def drop(self) -> None:
        """Free the copies on the device."""
        self.arrived = False
        for each in self.carried:
            each.drop()


def host_memory(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)
