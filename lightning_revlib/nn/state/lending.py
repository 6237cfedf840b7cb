"""Buffers that modules have only while a block runs again."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_revlib.nn.state.base import brief
from lightning_revlib.nn.state.entries import swapped

_LENT: dict[nn.Module, int] = {}  # modules that have others' buffers, by the thread that runs them again


@contextmanager
def lend(buffers: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Give modules these buffers inside the context, and their own at its end; ABSENT takes one away."""
    borrowers = {m: threading.get_ident() for m, _, _ in buffers}
    tell_of_threads(borrowers)
    _LENT.update(borrowers)
    try:
        with swapped((m._buffers, name, buffer) for m, name, buffer in buffers):
            yield
    finally:
        for m in borrowers:
            _LENT.pop(m, None)


def tell_of_threads(modules: Iterable[nn.Module]) -> None:
    """Warn if another thread runs one of the modules again, whose buffers are others meanwhile."""
    for m in modules if _LENT else ():
        if _LENT.get(m, threading.get_ident()) != threading.get_ident():
            warnings.warn(
                f"{brief(m)} runs in two threads at once, and its buffers are others while a block runs again: what"
                " this call writes into them may be lost; give each thread a copy of the model, or take processes",
                stacklevel=2,
            )
