"""Buffers: what a block's call reads of them, and the former values of those that it changes."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from lightning_revlib.nn.state.attributes import ABSENT
from lightning_revlib.nn.state.base import Call, State
from lightning_revlib.nn.state.lending import buffer_of, lend, tell_of_threads
from lightning_revlib.nn.state.norm_statistics import WRITES_STATISTICS, is_usual
from lightning_revlib.nn.state.parameters import value_then
from lightning_revlib.nn.state.tensors import is_fake, version


class Buffers(State):
    """The buffers that a block's call meets, but for statistics of norms. A second run leaves them untouched.

    It gets the buffers that the first run has only read, and copies of the former values of others. A buffer that was
    read, and has been modified in place since, is an error, unless a later call of the same forward did it.
    """

    __slots__ = ("former", "met", "names", "part", "read", "values")

    def __init__(self, call: Call) -> None:
        self.values, self.part = call.former, call.part
        tell_of_threads(call.modules)
        # A call of another module than torch's may register one. A scripted module has no dict of them.
        self.names = [(m, tuple(m._buffers.keys())) for m in call.modules if m in call.authored]
        self.met: list[tuple[nn.Module, str, Tensor, Tensor, int, bool]] = []  # with a copy, version and training flag
        self.read: list[tuple[nn.Module, str, Tensor | None, int]] = []  # with its version
        self.former: list[tuple[nn.Module, str, Any]] = []  # None, or ABSENT, if the call has set it, or registered it
        copies: dict[int, Tensor] = {}
        for m in call.modules:
            if not m._buffers or is_usual(m):
                continue
            for name, buffer in m._buffers.items():
                if buffer is None:
                    self.read.append((m, name, None, 0))
                elif not isinstance(buffer, UninitializedBuffer):
                    before = copies.setdefault(id(buffer), copy_of(buffer))  # one of a buffer with several names
                    self.met.append((m, name, before, buffer, version(buffer), m.training))

    @classmethod
    def concerns(cls, call: Call) -> bool:
        return bool(call.authored) or any([m._buffers and not is_usual(m) for m in call.modules])

    def close(self) -> bool:
        empty = [(m, name) for m, name, _, _ in self.read]
        self.read = [(m, name, None, 0) for m, name in empty if buffer_of(m, name) is None]
        self.former += [(m, name, None) for m, name in empty if buffer_of(m, name) is not None]
        grown = [(m, names) for m, names in self.names if tuple(m._buffers.keys()) != names]
        self.former += [(m, name, ABSENT) for m, names in grown for name in m._buffers.keys() if name not in names]
        for m, name, before, buffer, count, training in self.met:
            if (
                buffer_of(m, name) is not buffer
                or version(buffer) != count
                or changes_silently(m, name, training, before, buffer, self.part)
            ):
                self.former.append((m, name, before))
                self.values[id(buffer), count] = buffer, before
            else:
                self.read.append((m, name, buffer, count))
        self.met, self.names = [], []
        return bool(self.read or self.former)

    def restore(self, modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
        then = [(m, name, value_then(b, count, self.values, "buffer", name, m)) for m, name, b, count in self.read]
        copies = {id(b): copy_of(b) for _, _, b in self.former if isinstance(b, Tensor)}
        former = [(m, name, copies.get(id(b), b)) for m, name, b in self.former]
        return lend([(m, name, b) for m, name, b in then if buffer_of(m, name) is not b] + former)


def copy_of(buffer: Tensor) -> Tensor:
    """Return a copy, which requires grad if the buffer does: its graph is another forward's."""
    return buffer.detach().clone().requires_grad_(buffer.requires_grad)


_SILENT: MutableMapping[nn.Module, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()


def changes_silently(m: nn.Module, name: str, training: bool, before: Tensor, buffer: Tensor, part: str) -> bool:
    """Return whether the module changes the buffer without its version telling, as `F.batch_norm` does.

    Comparing values makes the host wait for the device, so that it is done once for each module and its flags.
    """
    if buffer.is_meta or is_fake(buffer) or buffer.layout is not torch.strided:
        return False
    if getattr(type(m), "forward", None) in WRITES_STATISTICS and training:  # though it may not have been called
        return True
    known, key = _SILENT.setdefault(m, {}), _flags(m, name, training, part)
    if key not in known:
        known[key] = not torch.equal(before, buffer)
    return known[key]


def is_known_to_keep(m: nn.Module, name: str, part: str) -> bool:
    """Return whether such a call of the module, with the same flags, was found to leave its tensor as it is."""
    return _SILENT.get(m, {}).get(_flags(m, name, m.training, part)) is False


def _flags(m: nn.Module, name: str, training: bool, part: str) -> tuple[Any, ...]:
    return part, name, training, *[value for value in vars(m).values() if type(value) is bool]
