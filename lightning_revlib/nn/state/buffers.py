"""Buffers: what a block's call reads of them, and the former values of those that it changes."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from lightning_revlib.nn.state.base import Call, State
from lightning_revlib.nn.state.entries import ABSENT, value_of
from lightning_revlib.nn.state.lending import lend, tell_of_threads
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
        self.met: list[tuple[nn.Module, str, Any, Any, int, bool]] = []  # with a copy, version and training flag
        self.read: list[tuple[nn.Module, str, Tensor | None, int]] = []  # with its version
        self.former: list[tuple[nn.Module, str, Any]] = []  # None, or ABSENT, if the call has set it, or registered it
        copies: dict[int, Any] = {id(None): None}  # one of a buffer with several names
        b: Any
        for m in [m for m in call.modules if m._buffers and not is_usual(m)]:
            for name, b in m._buffers.items():
                if not isinstance(b, UninitializedBuffer):
                    if id(b) not in copies:
                        copies[id(b)] = copy_of(b)
                    self.met.append((m, name, copies[id(b)], b, 0 if b is None else version(b), m.training))

    @classmethod
    def concerns(cls, call: Call) -> bool:
        return bool(call.authored) or any([m._buffers and not is_usual(m) for m in call.modules])

    def close(self) -> bool:
        grown = [(m, names) for m, names in self.names if tuple(m._buffers.keys()) != names]
        self.former += [(m, name, ABSENT) for m, names in grown for name in m._buffers.keys() if name not in names]
        for m, name, before, buffer, count, training in self.met:
            is_same = value_of(m._buffers, name) is buffer and (buffer is None or version(buffer) == count)
            if not is_same or changes_silently(m, name, training, before, buffer, self.part):
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
        return lend([(m, name, b) for m, name, b in then if value_of(m._buffers, name) is not b] + former)


def copy_of(buffer: Tensor) -> Tensor:
    """Return a copy, which requires grad if the buffer does: its graph is another forward's."""
    return buffer.detach().clone().requires_grad_(buffer.requires_grad)


_SILENT: MutableMapping[nn.Module, dict[tuple[Any, ...], bool]] = WeakKeyDictionary()


def changes_silently(m: nn.Module, name: str, training: bool, before: Any, buffer: Any, part: str) -> bool:
    """Return whether the module changes the buffer without its version telling, as `F.batch_norm` does.

    Comparing values makes the host wait for the device, so that it is done once for each module and its flags.
    """
    if buffer is None or buffer.is_meta or is_fake(buffer) or buffer.layout is not torch.strided:
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
