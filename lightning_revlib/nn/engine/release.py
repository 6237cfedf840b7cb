"""Whether only autograd holds a tensor's memory: then to copy a part of it lets go of the rest.

A stack's output and the gradient of that are read by halves, one step after the other. A view of a half keeps all of
them; a copy does not, unless somebody else does.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

LARGE = 512 * 1024  # bytes of a half below which its copy takes more time than the bytes are worth


def is_alone(t: Tensor) -> bool:
    """Whether no other tensor shares the memory of this one, which the caller holds and nobody besides."""
    return _holders(t) == _holders(torch.empty(0))


def part_gradient(y: Tensor) -> None:
    """Have backward make the halves of y's gradient tensors of their own, where that lets go of the whole."""
    if y.grad_fn is not None:
        _in_a_hook()
        y.grad_fn.register_hook(_copy)


def _copy(halves: Sequence[Tensor | None], whole: Sequence[Tensor]) -> tuple[Tensor | None, ...] | None:
    if _counts(whole[0]) != _in_a_hook():
        return None
    return tuple(None if half is None else half.clone() for half in halves)


def _counts(t: Tensor) -> tuple[int, int]:
    return _holders(t), t._use_count()  # type: ignore[attr-defined]


def _holders(t: Tensor) -> int:
    return torch._C._storage_Use_Count(t.untyped_storage()._cdata)


@lru_cache(maxsize=1)
def _in_a_hook() -> tuple[int, int]:
    """The counts of a gradient that nobody else holds, found by an example."""
    found: list[tuple[int, int]] = []
    with torch.enable_grad():
        a = torch.zeros(1, device="cpu", requires_grad=True)
        y = torch.cat((a * 1, a * 1))
        y.grad_fn.register_hook(lambda halves, whole: found.append(_counts(whole[0])))  # type: ignore[union-attr]
        torch.autograd.grad((y * torch.ones(2, device="cpu")).sum(), a)
    return found[0]
