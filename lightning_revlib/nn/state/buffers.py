"""What a block's call reads or changes besides parameters, as it was before it: buffers, numbers, generators."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from lightning_revlib.nn.state.norm_statistics import WRITES_STATISTICS, NormBefore, batches, is_usual, scratch
from lightning_revlib.nn.state.parameters import modified, version

BUFFERS = attrgetter("_buffers")


class Buffers:
    """The buffers that a block's call meets, and the former values of those that it changes.

    Made before the call, closed after it. `lend` gives the modules the buffers again that the call has only
    read, and copies of the former values of others, for a second call to see what the first saw; it returns
    a call that puts the buffers back untouched. What was read and has been modified in place is an error.

    In training a batch norm writes its statistics and reads none, so that no copy need be held, and
    it is lent others to write into: `scratch`. Where it cannot be told whether a norm writes them or reads them, as a
    block sets its training in the call, or hands them to functions itself, it is lent copies of what there is then.

    Numbers are attributes that are an int or a float, such as the length of a table or how often a block was called:
    with `numbers` those of all modules, else of modules whose buffers the call may change. And with `numbers`, too, the
    generators among the attributes.
    """

    __slots__ = ("changing", "copied", "generators", "norms", "numbers", "read", "written")

    def __init__(self, modules: Sequence[nn.Module] = (), *, numbers: bool = False) -> None:
        self.written: list[tuple[dict[str, Any], int]] = []  # a norm's attributes, and its number in the block
        self.copied: list[nn.Module] = []
        self.norms: list[NormBefore] = []
        self.changing: list[tuple[Any, ...]] = []
        self.read: list[tuple[nn.Module, str, Tensor | None, int | None]] = []
        for m in filter(BUFFERS, modules):
            if getattr(type(m), "forward", None) in WRITES_STATISTICS and is_usual(m):
                self.norms.append((m, m.training, batches(m)))
                continue
            for name, buffer in m._buffers.items():
                if buffer is None:
                    self.read.append((m, name, None, 0))
                elif not isinstance(buffer, UninitializedBuffer):
                    self.changing.append((m, name, buffer.detach().clone(), buffer, version(buffer), m.training))
        self.numbers: list[tuple[nn.Module, dict[str, Any]]] = []
        if numbers or self.changing:
            holders = modules if numbers else dict.fromkeys(met[0] for met in self.changing)
            self.numbers = [(m, {name: n for name, n in m.__dict__.items() if type(n) in NUMBER}) for m in holders]
        self.generators: list[tuple[torch.Generator, Tensor]] = []
        if numbers:
            found = (g for m in modules for g in m.__dict__.values() if type(g) is torch.Generator)
            self.generators = [(g, g.get_state()) for g in dict.fromkeys(found)]

    def close(self) -> bool:
        """Keep the values only of what the call has changed, in place or by a new one; whether there is any to lend."""
        if self.read or self.changing or self.numbers:
            self._close_changing()
        self.generators = [(g, state) for g, state in self.generators if not torch.equal(g.get_state(), state)]
        self.close_norms(self.norms)
        return self.any() or bool(self.read)

    def close_norms(self, norms: Sequence[NormBefore]) -> None:
        """Of a block's norms, as they were before its call: whether it has written their statistics, or read them."""
        for number, (m, training, before) in enumerate(norms):
            buffers, counted = m._buffers, before is not None and batches(m) != before
            if buffers["running_mean"] is None:
                continue
            if training and m.training and counted:
                self.written.append((m.__dict__, number))
            elif counted or m.training:
                self.copied.append(m)
            else:
                self.read += [(m, name, b, 0 if b is None else version(b)) for name, b in buffers.items()]

    def _close_changing(self) -> None:
        self.numbers = [(m, former) for m, before in self.numbers if (former := _former(m.__dict__, before))]
        self.read = [met for met in self.read if met[2] is not None or _now(*met[:2]) is None]
        met, self.changing = self.changing, []
        for m, name, before, buffer, count, training in met:
            if (
                _now(m, name) is not buffer
                or version(buffer) != count
                or _silently(before, buffer, (training, name), type(m))
            ):
                self.changing.append((m, name, before))
            else:
                self.read.append((m, name, buffer, count))

    def any(self) -> bool:
        """Whether the call has changed any."""
        return bool(self.written or self.copied or self.changing or self.counts)

    @property
    def counts(self) -> bool:
        """Whether it has changed a number, or drawn from a generator of its own."""
        return bool(self.numbers or self.generators)

    def lend(self) -> Callable[[], None]:
        for m, name, buffer, count in self.read:
            if buffer is not None and version(buffer) != count:
                raise modified(f"buffer {name!r} of {m}")
        norms = [(owner, owner["_buffers"]) for owner, _ in self.written]
        for owner, number in self.written:  # some of its own for each of a block's
            owner["_buffers"] = {**owner["_buffers"], **scratch(number, owner["_buffers"])}
        for m in self.copied:
            norms.append((m.__dict__, m._buffers))
            m.__dict__["_buffers"] = {name: b if b is None else b.clone() for name, b in m._buffers.items()}
        drawn = [(g, g.get_state()) for g, _ in self.generators]
        for g, state in self.generators:
            g.set_state(state)
        return partial(_put_back, norms, self._exchange() if self.read or self.changing or self.numbers else [], drawn)

    def _exchange(self) -> list[tuple[Any, str, Any]]:
        """Set what the call is to meet; returns what was set, by dict and name."""
        lent = [(m, name, b) for m, name, b, _ in self.read if _now(m, name) is not b]
        lent += [(m, name, before.clone()) for m, name, before in self.changing]
        now = [(m._buffers, name, _now(m, name)) for m, name, _ in lent]
        for m, name, buffer in lent:
            m._buffers[name] = buffer
        for m, former in self.numbers:
            now += [(m.__dict__, name, m.__dict__.get(name, ABSENT)) for name in former]
            m.__dict__.update(former)
        return now


ABSENT: Any = object()
NUMBER = (int, float)
_SILENT: MutableMapping[type, dict[tuple[bool, str], bool]] = WeakKeyDictionary()


def _silently(before: Tensor, buffer: Tensor, key: tuple[bool, str], kind: type) -> bool:
    """Whether modules of this kind change the buffer without its version telling, as `F.batch_norm` does.

    To compare values makes the host wait for the device, so that it is done once for each class.
    """
    if buffer.is_meta:
        return False
    if getattr(kind, "forward", None) in WRITES_STATISTICS and key[0]:  # though it may not have been called
        return True
    known = _SILENT.setdefault(kind, {})
    if key not in known:
        known[key] = not torch.equal(before, buffer)
    return known[key]


def _former(now: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Those of the numbers before that are others now."""
    return {name: n for name, n in before.items() if type(now.get(name)) in NUMBER and now[name] != n}


def _now(m: nn.Module, name: str) -> Any:
    buffers = m._buffers
    return buffers[name] if name in buffers else ABSENT  # a scripted module has no dict of them


def _put_back(
    norms: list[tuple[dict[str, Any], Any]],
    now: list[tuple[dict[str, Any], str, Any]],
    drawn: list[tuple[torch.Generator, Tensor]],
) -> None:
    for g, state in drawn:
        g.set_state(state)
    for owner, buffers in reversed(norms):
        owner["_buffers"] = buffers
    for buffers, name, buffer in reversed(now):
        if buffer is ABSENT:
            del buffers[name]
        else:
            buffers[name] = buffer
