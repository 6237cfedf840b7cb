"""Drift: the difference between a stack's input and backward's reconstruction of it, expected and measured."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from lightning_revlib.nn.coupling.base import Coupling, Streams

SAMPLE = 256  # elements a stream, at most; never more than one in 512


class Sentinel:
    """A small sample of both streams at a stack's entrance, to be compared with their reconstruction."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.sample = take(a, b)

    def error(self, taken: Streams) -> Tensor:
        """Return |taken - sample| / |sample| in the 2-norm, on the streams' device; |taken| if the sample is zero.

        `taken` is what `take` returned of the reconstruction. It is joined only here, since most drifts are never read.
        """
        sample, rebuilt = torch.stack(self.sample), torch.stack(taken)
        size = sample.norm()
        return (rebuilt - sample).norm() / torch.where(size == 0, 1, size)

    @staticmethod
    def bytes(stream: Tensor) -> int:
        """Return the most bytes that a sentinel of such streams needs: its sample, another, and their difference."""
        return 6 * math.prod(_places(stream.shape, stream.stride())[0]) * stream.element_size() + 64


def take(a: Tensor, b: Tensor) -> Streams:
    """Return a sample of each stream: at most `SAMPLE` of its elements, evenly spaced, with as many dimensions."""
    if a.is_nested:  # of the jagged layout
        a, b = a.values(), b.values()
    return (
        torch.as_strided_copy(a, *_places(a.shape, a.stride()), a.storage_offset()),
        torch.as_strided_copy(b, *_places(b.shape, b.stride()), b.storage_offset()),
    )


@lru_cache(maxsize=256)
def _places(shape: torch.Size, strides: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Return size and strides of the view that is a sample: every n-th element along each dimension."""
    left = max(8, min(SAMPLE, shape.numel() // 512))
    size = list(shape)
    for done, dim in enumerate(sorted(range(len(shape)), key=shape.__getitem__)):  # shortest first
        size[dim] = min(size[dim], max(1, int(left ** (1 / (len(shape) - done)) + 1e-9)))
        left //= max(1, size[dim])
    return size, [n // max(1, k) * stride for n, k, stride in zip(shape, size, strides, strict=True)]


def expected_drift(coupling: Coupling, depth: int, dtype: torch.dtype) -> float:
    """Return a bound of the drift's order of magnitude after `depth` steps: eps (1 + g + ... + g^(depth - 1)).

    g is the coupling's `growth`, and eps is the rounding of streams of `dtype`. Blocks that amplify their input add to
    the drift.
    """
    eps, g = torch.finfo(dtype).eps, coupling.growth
    if g in (0.0, 1.0, math.inf):
        return eps * depth * g
    return eps * math.expm1(min(depth * math.log(g), 700)) / (g - 1)
