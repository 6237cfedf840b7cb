"""Steps whose saved tensors wait for backward in the host's pinned memory, copied beside the device's work.

    main   step 1 | step 2        | ... | backward 2     | backward 1
    side          | 1 to the host | ...   1 to the device |

Storages are copied whole, once each however many tensors of them are saved. What the block owns, parameters and
buffers, stays where it is, and so does what is small. On the device is, at most, what two steps save. Side waits for
main before it begins; main waits for side before memory that side reads may be freed, and before it uses what side has
brought.
"""

from __future__ import annotations

import weakref
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_revlib.nn.coupling.base import Streams

if TYPE_CHECKING:
    from lightning_revlib.nn.steps.step import Step

SMALLEST = 64 * 1024  # bytes; copies of less take longer to begin than to make


class Convoy:
    """What the parcels of one forward of a stack share: the way, and who is on it in backward."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, torch.get_device_module(device)
        self.side = copy_stream(self.module, device)
        self.here: weakref.ref[Parcel] | None = None  # the one whose tensors backward uses
        self.ahead: weakref.ref[Parcel] | None = None  # the one that is on its way, for the step before

    @property
    def main(self) -> Any:
        return self.module.current_stream(self.device)

    def fetch(self, parcel: Parcel) -> None:
        """Bring a parcel's tensors to the device, if they are not on their way, and send for the step's before."""
        here, ahead = (None if ref is None else ref() for ref in (self.here, self.ahead))
        if ahead is not parcel:
            self._load(parcel)
        self.main.wait_stream(self.side)
        parcel.arrived = True
        for other in (here, ahead):
            if other is not None and other is not parcel and other is not parcel.before:
                other.drop()  # what is left was saved for an output that nobody uses
        if parcel.before is not None and ahead is not parcel.before:
            self._load(parcel.before)
        self.here, self.ahead = weakref.ref(parcel), None if parcel.before is None else weakref.ref(parcel.before)

    def _load(self, parcel: Parcel) -> None:
        self.side.wait_stream(self.main)  # of the memory of side's pool, what main has let go is not in use
        parcel.drop()
        with self.module.stream(self.side):
            for number, host in enumerate(parcel.hosts):
                parcel.there[number] = torch.empty_like(host, device=self.device, pin_memory=False)
                parcel.there[number].copy_(host, non_blocking=True)


class Parcel:
    """What autograd saves in one step; `before` is the parcel of the step before, if that is offloaded, too."""

    def __init__(self, convoy: Convoy, module: nn.Module, before: Parcel | None) -> None:
        self.convoy, self.module, self.before = convoy, module, before
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
        """The last of steps in a row: what follows may change and free what is being copied."""
        self.convoy.main.wait_stream(self.convoy.side)
        for parcel in filter(None, (self, self.before)):
            parcel.sources.clear()

    @torch.compiler.disable
    def pack(self, t: Tensor) -> Any:
        storage = t.untyped_storage()
        if type(t) is not Tensor or t.device != self.convoy.device or storage.nbytes() < SMALLEST:
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
        convoy = self.convoy
        source = torch.empty(0, dtype=torch.uint8, device=convoy.device).set_(storage)
        host = host_memory(source)
        convoy.side.wait_stream(convoy.main)
        with convoy.module.stream(convoy.side):
            host.copy_(source, non_blocking=True)
        self.hosts.append(host)
        self.uses.append(0)

    def _close(self, name: str) -> None:
        if changed := [t.shape for (_, count), (_, t) in self.sources.items() if t._version != count]:
            raise RuntimeError(
                f"{name}: a tensor of shape {list(changed[0])} needed for its gradient has been modified by an inplace"
                " operation inside the block; use the operation that is not in-place"
            )
        self.drop()
        self.sent = self.convoy.side.record_event()
        if self.before is not None and self.before.sources:
            self.convoy.main.wait_event(self.before.sent)
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
                self.convoy.fetch(self)
            whole = self.there[number]
            self.left[number] -= 1
            if not self.left[number]:
                self.there[number] = None
        return torch.empty(0, dtype=dtype, device=whole.device).set_(whole.untyped_storage(), offset, shape, stride)

    def drop(self) -> None:
        self.there, self.left, self.arrived = [None] * len(self.hosts), [*self.uses], False


def host_memory(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)


@lru_cache(maxsize=64)
def copy_stream(module: Any, device: torch.device) -> Any:
    return module.Stream(device=device)
