"""Freeing the whole of a tensor as soon as its halves have been copied.

A stack's output, and the gradient of the output, are read by halves, one step after the other. A view of one half keeps
the whole in memory; a copy frees it, if autograd holds the only reference. It saves up to two outputs at the peak.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_revlib.nn.internals import holders

LARGE = 512 * 1024  # bytes of a half below which its copy takes more time than the bytes are worth


def is_sole_owner(t: Tensor) -> bool:
    """Return whether no other tensor shares the memory of this one, which is `outputs[0]` of a tape that reads it."""
    return holders(t)[0] == holders(torch.empty(0))[0]


def free_whole_gradient(y: Tensor) -> None:
    """Have backward copy the halves of y's gradient if that frees the whole; y joins two streams."""
    if y.grad_fn is not None:
        _holders_in_a_hook()
        y.grad_fn.register_hook(_copy)


def _copy(halves: Sequence[Tensor | None], whole: Sequence[Tensor]) -> tuple[Tensor | None, ...] | None:
    try:
        found = holders(whole[0])
    except NotImplementedError:  # a batched gradient has no storage of its own
        return None
    if found != _holders_in_a_hook():
        return None
    return tuple(None if half is None else half.clone() for half in halves)


@lru_cache(maxsize=1)
def _holders_in_a_hook() -> tuple[int, int]:
    """Return the holders of a gradient that nobody else refers to, found by an example."""
    found: list[tuple[int, int]] = []
    with torch.enable_grad():
        a = torch.zeros(1, device="cpu", requires_grad=True)
        y = torch.cat((a * 1, a * 1))
        y.grad_fn.register_hook(lambda halves, whole: found.append(holders(whole[0])))  # type: ignore[union-attr]
        torch.autograd.grad((y * torch.ones(2, device="cpu")).sum(), a)
    return found[0]
