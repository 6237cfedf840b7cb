"""torch.compile, turned off while the engine runs and while each operation has to be seen, and on again for a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from typing_extensions import Self

from lightning_revlib.nn.internals import TorchDispatchMode, set_eval_frame


@contextmanager
def compiled_by(callback: Any) -> Iterator[Any]:
    """Have `callback` compile what this thread runs inside, None for nothing; yield the callback before.

    The engine turns torch.compile off by it, and on again for a block, which `torch.compiler.disable` cannot. Watch
    torch.compiler for a context manager that does both.
    """
    before = set_eval_frame(None if is_eager() else callback)
    try:
        yield before
    finally:
        set_eval_frame(before)


_stances: list[Any] = []  # torch's context that makes compiled code run eagerly, once for each user of it


def is_eager() -> bool:
    """Return whether compiled code runs eagerly now, by `eager`."""
    return bool(_stances)


@contextmanager
def eager() -> Iterator[None]:
    """Have what torch.compile has made run eagerly inside, in all threads.

    Under a dispatch mode torch would compile nothing either, and mark the code as not to be compiled later on.
    """
    with compiled_by(None):  # no compiler may be active while torch's stance is set
        _stances.append(_stances[-1] if _stances else torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            stance = _stances.pop()
            if not _stances:
                stance.__exit__(None, None, None)


class EagerMode(TorchDispatchMode):
    """A dispatch mode that has to see each operation: torch.compile is off inside."""

    supports_higher_order_operators = True  # such as flex_attention, as one operation

    def __init__(self) -> None:
        super().__init__()
        self._eager: list[Any] = []  # contexts, one for each time that it was entered

    def __enter__(self) -> Self:  # torch's has no type
        self._eager.append(eager())
        self._eager[-1].__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._eager.pop().__exit__(*error)
