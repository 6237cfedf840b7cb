"""The values of the buffers that a block's call changes, as they were before it."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import UninitializedBuffer

from lightning_revlib.nn.settings import version


class Buffers:
    """The former values of the buffers that a block's call changes.

    Made before the call, closed after it. `lend` gives the modules copies of these values, for a
    second call to see what the first saw, and returns a call that puts the buffers back untouched.

    In training a batch norm writes its statistics and reads none, so that no copy need be held, and
    what is lent may be anything: `scratch`, where the blocks of one backward find each other's.
    """

    __slots__ = ("changing", "written")

    def __init__(self, modules: list[nn.Module]) -> None:
        self.written: list[tuple[dict[str, Any], str]] = []
        self.changing: list[tuple[Any, ...]] = []
        for m in modules:
            if not m._buffers:
                continue
            writes = m.training and type(m).forward in WRITES_STATISTICS and "forward" not in m.__dict__
            for name, buffer in m._buffers.items():
                if buffer is None or isinstance(buffer, UninitializedBuffer):
                    continue
                if writes and name in STATISTICS:
                    self.written.append((m._buffers, name))
                else:
                    before, kind = buffer.detach().clone(), ((m.training, name), type(m))
                    self.changing.append((m._buffers, name, before, buffer, version(buffer), *kind))

    def close(self) -> None:
        """Keep only the buffers that the call has changed, in place or by a new tensor."""
        if self.changing:
            self.changing = [
                (buffers, name, before)
                for buffers, name, before, buffer, count, *kind in self.changing
                if name not in buffers
                or buffers[name] is not buffer
                or version(buffer) != count
                or _silently(before, buffer, *kind)
            ]

    def any(self) -> bool:
        """Whether the call has changed any."""
        return bool(self.written or self.changing)

    def lend(self, scratch: dict[Any, Tensor]) -> Callable[[], None]:
        now = [(buffers, name, buffers[name]) for buffers, name, *_ in chain(self.written, self.changing)]
        for number, (buffers, name) in enumerate(self.written):  # one of its own for each of a block's
            buffer = buffers[name]
            key = number, buffer.shape, buffer.dtype, buffer.device
            if key not in scratch:  # counted are batches: a number must be one
                scratch[key] = torch.empty_like(buffer) if buffer.ndim else buffer.clone()
            buffers[name] = scratch[key]
        for buffers, name, before in self.changing:
            buffers[name] = before.clone()
        return partial(_put_back, now)


WRITES_STATISTICS = (_BatchNorm.forward, _InstanceNorm.forward, nn.SyncBatchNorm.forward)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

_SILENT: MutableMapping[type, dict[tuple[bool, str], bool]] = WeakKeyDictionary()


def _silently(before: Tensor, buffer: Tensor, key: tuple[bool, str], kind: type) -> bool:
    """Whether modules of this kind change the buffer without its version telling, as `F.batch_norm` does.

    To compare values makes the host wait for the device, so that it is done once for each class.
    """
    if buffer.is_meta:
        return False
    known = _SILENT.setdefault(kind, {})
    if key not in known:
        known[key] = not torch.equal(before, buffer)
    return known[key]


def _put_back(buffers: list[tuple[dict[str, Any], str, Any]]) -> None:
    for registered, name, buffer in reversed(buffers):
        registered[name] = buffer
