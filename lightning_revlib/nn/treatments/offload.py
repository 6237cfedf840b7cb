"""Treatment "offload": what blocks save waits for backward in pinned memory of the host.

    main   step 1 | step 2        | ... | backward 2     | backward 1
    side          | 1 to the host | ...   1 to the device |

Copies run beside the device's work. Storages are copied whole, and once each, however many tensors of them are saved.
What the block owns, parameters and buffers, stays where it is, and so does what is small. At most, what two steps save
is on the device. Side waits for main before it begins; main waits for side before memory that side reads may be freed,
and before it uses what side has brought.
"""

from __future__ import annotations

import weakref
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.engine import errors
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.base import StepCost, Treatment
from lightning_revlib.nn.treatments.forward import Forward
from lightning_revlib.nn.treatments.streams import has_streams, side_stream

SMALLEST = 64 * 1024  # bytes; a copy of less takes longer to begin than to make
FLOPS_PER_CARRIED_BYTE = 8_000  # FLOPs that a GPU does while a byte is copied to the host or back


class Offload(Treatment):
    """Keep everything that the block saves in the host's memory, on devices with streams."""

    def __init__(self, forward: Forward, a: Tensor, b: Tensor) -> None:
        super().__init__(forward, a, b)
        self.transfer = Transfer(a.device)
        self.last: OffloadedStep | None = None

    @classmethod
    def is_possible(cls, step: Step, device: torch.device) -> bool:
        return super().is_possible(step, device) and has_streams(device)

    def step(self, step: Step, a: Tensor, b: Tensor) -> Streams:
        self.last = OffloadedStep(self.transfer, step.module, self.last)
        return self.last.run(step, a, b, self.forward.compiler)

    def close(self, a: Tensor, b: Tensor) -> None:
        if self.last is not None:
            self.last.end()

    def close_joined(self, y: Tensor, halve: Any) -> None:
        self.close(y, y)

    @classmethod
    def cost(cls, alone: StepCost, stored: StepCost) -> StepCost:
        """Add what the steps beside it have on their way, and the time of copies."""
        moved = stored.held - alone.held
        work = max(stored.work, 2 * moved * FLOPS_PER_CARRIED_BYTE)
        return StepCost(alone.held, alone.forward + moved, alone.backward + moved, work, alone.kept)


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
        step.arrived = True
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


class OffloadedStep:
    """What autograd saves in one step; `before` is the step before it, if that is offloaded, too."""

    def __init__(self, transfer: Transfer, module: nn.Module, before: OffloadedStep | None) -> None:
        self.transfer, self.module, self.before = transfer, module, before
        self.owned: set[int] | None = None  # storages that stay
        self.hosts: list[Tensor] = []  # storages' bytes in host memory
        self.there: list[Any] = []  # tensors or None: and on the device, in backward
        self.uses: list[int] = []  # how many tensors were saved of each
        self.left: list[int] = []  # of these, how many backward has not yet asked for
        self.arrived = False  # and main has waited for them
        self.sources: dict[tuple[int, int], tuple[int, Tensor]] = {}  # by storage and version, while they are copied
        self.sent: Any = None  # when they all are

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
            step.sources.clear()

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
        if key not in self.sources:
            self.sources[key] = len(self.hosts), t.detach()  # t refers to the graph, which refers to this
            self._send(storage)
        number = self.sources[key][0]
        self.uses[number] += 1
        return number, t.dtype, t.storage_offset(), t.shape, t.stride()

    def _send(self, storage: torch.UntypedStorage) -> None:
        transfer = self.transfer
        source = torch.empty(0, dtype=torch.uint8, device=transfer.device).set_(storage)
        host = host_memory(source)
        transfer.side.wait_stream(transfer.main)
        with transfer.module.stream(transfer.side):
            host.copy_(source, non_blocking=True)
        self.hosts.append(host)
        self.uses.append(0)

    def _close(self, name: str) -> None:
        if changed := [t.shape for (_, count), (_, t) in self.sources.items() if t._version != count]:
            raise errors.saved_modified(name, changed[0])
        self.drop()
        self.sent = self.transfer.side.record_event()
        if self.before is not None and self.before.sources:
            self.transfer.main.wait_event(self.before.sent)
            self.before.sources.clear()

    @torch.compiler.disable
    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        number, dtype, offset, shape, stride = packed
        if self.sent is None:  # the step has not ended: its block calls autograd itself
            whole = list(self.sources.values())[number][1]
        else:
            if not self.arrived or self.there[number] is None:
                self.transfer.fetch(self)
            whole = self.there[number]
            self.left[number] -= 1
            if not self.left[number]:
                self.there[number] = None
        return torch.empty(0, dtype=dtype, device=whole.device).set_(whole.untyped_storage(), offset, shape, stride)

    def load(self, device: torch.device) -> None:
        """Begin to copy all storages to the device."""
        for number, host in enumerate(self.hosts):
            self.there[number] = torch.empty_like(host, device=device, pin_memory=False)
            self.there[number].copy_(host, non_blocking=True)

    def drop(self) -> None:
        """Free the copies on the device."""
        self.there, self.left, self.arrived = [None] * len(self.hosts), [*self.uses], False


def host_memory(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)
