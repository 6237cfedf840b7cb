"""Buffers that modules have only while a block runs again."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_revlib.nn.state.attributes import ABSENT
from lightning_revlib.nn.state.base import brief

_LENT: dict[nn.Module, int] = {}  # modules that have others' buffers, by the thread that runs them again


@contextmanager
def lend(buffers: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Have modules meet these buffers, by name, and at the end those of before. ABSENT takes one away."""
    before = [(m, name, buffer_of(m, name)) for m, name, _ in buffers]
    borrowers = {m: threading.get_ident() for m, _, _ in buffers}
    tell_of_threads(borrowers)
    _LENT.update(borrowers)
    _set(buffers)
    try:
        yield
    finally:
        _set(reversed(before))
        for m in borrowers:
            _LENT.pop(m, None)


def buffer_of(m: nn.Module, name: str) -> Any:
    """Return a module's own buffer, or ABSENT; a scripted module has no dict of them."""
    return m._buffers[name] if name in m._buffers else ABSENT


def tell_of_threads(modules: Iterable[nn.Module]) -> None:
    """Warn if another thread runs one of the modules again, whose buffers are others meanwhile."""
    for m in modules if _LENT else ():
        if _LENT.get(m, threading.get_ident()) != threading.get_ident():
            warnings.warn(
                f"{brief(m)} runs in two threads at once, and its buffers are others while a block runs again: what"
                " this call writes into them may be lost; give each thread a copy of the model, or take processes",
                stacklevel=2,
            )


def _set(buffers: Iterable[tuple[nn.Module, str, Any]]) -> None:
    for m, name, buffer in buffers:
        if buffer is not ABSENT:
            m._buffers[name] = buffer
        elif name in m._buffers:
            del m._buffers[name]
