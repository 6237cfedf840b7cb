"""Buffers: what a block's call reads of them, and the former values of those that it changes."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from lightning_revlib.nn.state.attributes import ABSENT
from lightning_revlib.nn.state.base import Call, State, brief
from lightning_revlib.nn.state.norm_statistics import WRITES_STATISTICS, batches, is_usual
from lightning_revlib.nn.state.parameters import value_then
from lightning_revlib.nn.state.tensors import is_fake, version


class Buffers(State):
    """The buffers that a block's call meets. A second run leaves them untouched.

    It gets the buffers that the first run has only read, and copies of the former values of others. A buffer that was
    read, and has been modified in place since, is an error, unless a later call of the same forward did it.

    Norms in training write their statistics and read none. No former value need be held for them: the second run writes
    into copies of the present values.
    """

    __slots__ = ("former", "met", "names", "norms", "part", "read", "values", "written")

    def __init__(self, call: Call) -> None:
        self.values, self.part = call.former, call.part
        _tell_of_threads(call.modules)
        # A call of another module than torch's may register one. A scripted module has no dict of them.
        self.names = [(m, tuple(m._buffers.keys())) for m in call.modules if m in call.authored]
        self.met: list[tuple[nn.Module, str, Tensor, Tensor, int, bool]] = []  # with a copy, version and training flag
        self.read: list[tuple[nn.Module, str, Tensor | None, int]] = []  # with its version
        self.former: list[tuple[nn.Module, str, Any]] = []  # None, or ABSENT, if the call has set it, or registered it
        self.norms: list[tuple[nn.Module, int | None]] = []  # with the batches they have counted before
        self.written: list[nn.Module] = []  # norms
        copies: dict[int, Tensor] = {}
        for m in call.modules:
            if not m._buffers:
                continue
            if is_usual(m):
                self.norms.append((m, batches(m)))
                continue
            for name, buffer in m._buffers.items():
                if buffer is None:
                    self.read.append((m, name, None, 0))
                elif not isinstance(buffer, UninitializedBuffer):
                    before = copies.setdefault(id(buffer), copy_of(buffer))  # one of a buffer with several names
                    self.met.append((m, name, before, buffer, version(buffer), m.training))

    @classmethod
    def concerns(cls, call: Call) -> bool:
        return bool(call.authored) or any([m._buffers for m in call.modules])

    def close(self) -> bool:
        empty = [(m, name) for m, name, _, _ in self.read]
        self.read = [(m, name, None, 0) for m, name in empty if _now(m._buffers, name) is None]
        self.former += [(m, name, None) for m, name in empty if _now(m._buffers, name) is not None]
        grown = [(m, names) for m, names in self.names if tuple(m._buffers.keys()) != names]
        self.former += [(m, name, ABSENT) for m, names in grown for name in m._buffers.keys() if name not in names]
        for m, name, before, buffer, count, training in self.met:
            if (
                _now(m._buffers, name) is not buffer
                or version(buffer) != count
                or changes_silently(m, name, training, before, buffer, self.part)
            ):
                self.former.append((m, name, before))
                self.values[id(buffer), count] = buffer, before
            else:
                self.read.append((m, name, buffer, count))
        self._close_norms()
        self.met, self.norms, self.names = [], [], []
        return bool(self.read or self.former or self.written)

    def _close_norms(self) -> None:
        for m, before in self.norms:
            buffers = m._buffers
            if buffers["running_mean"] is None:
                continue
            if m.training or (before is not None and batches(m) != before):
                self.written.append(m)
            else:
                self.read += [(m, name, b, 0 if b is None else version(b)) for name, b in buffers.items()]

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        lent = [(m._buffers, name, value_then(b, n, self.values, "buffer", name, m)) for m, name, b, n in self.read]
        lent = [(buffers, name, b) for buffers, name, b in lent if _now(buffers, name) is not b]
        copies = {id(b): copy_of(b) for _, _, b in self.former if isinstance(b, Tensor)}
        lent += [(m._buffers, name, copies.get(id(b), b)) for m, name, b in self.former]
        lent += [(m._buffers, name, b.clone()) for m in self.written for name, b in m._buffers.items() if b is not None]
        now = [(buffers, name, _now(buffers, name)) for buffers, name, _ in lent]
        _tell_of_threads(modules)
        _LENT.update(dict.fromkeys(modules, threading.get_ident()) if lent else {})
        _set(lent)
        try:
            yield
        finally:
            _set(reversed(now))
            for m in modules:
                _LENT.pop(m, None)


def copy_of(buffer: Tensor) -> Tensor:
    """Return a copy, which requires grad if the buffer does: its graph is another forward's."""
    return buffer.detach().clone().requires_grad_(buffer.requires_grad)


_LENT: dict[nn.Module, int] = {}  # modules with other buffers at the moment, by the thread that runs them again


def _tell_of_threads(modules: Sequence[nn.Module]) -> None:
    """Warn if another thread runs one of the modules again, whose buffers are others meanwhile."""
    for m in modules if _LENT else ():
        if _LENT.get(m, threading.get_ident()) != threading.get_ident():
            warnings.warn(
                f"{brief(m)} runs in two threads at once, and its buffers are others while a block runs again: what"
                " this call writes into them may be lost; give each thread a copy of the model, or take processes",
                stacklevel=2,
            )


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


def _now(buffers: Any, name: str) -> Any:
    return buffers[name] if name in buffers else ABSENT


def _set(values: Iterable[tuple[Any, str, Any]]) -> None:
    for buffers, name, buffer in values:
        if buffer is not ABSENT:
            buffers[name] = buffer
        elif name in buffers:
            del buffers[name]
