"""Couplings: how a block's output joins two streams so that the step can be undone.

With f = block(b), a coupling states four things:

    forward(a, b, f)      -> (a', b')    the step
    recover(a', b')       -> b           what the block saw, found without the block
    inverse(a', b', b, f) -> a           the other stream, found with the block's output
    start(x) -> (a, b), finish(a, b) -> y    one stream in, one out (split_dim=None)

A coupling never states a gradient: autograd derives it from `forward`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from operator import mul
from typing import TypeAlias

import torch
from torch import Tensor

Streams: TypeAlias = tuple[Tensor, Tensor]


def has_gaps(stream: Tensor) -> bool:
    """Whether its memory, in whatever order of dimensions, holds more than its elements."""
    if stream.is_contiguous():
        return False
    strides = stream.stride()
    return sum(map(mul, stream.shape, strides)) - sum(strides) + 1 != stream.numel()


class Coupling(ABC):
    """Base of all couplings; subclass it, or `Alternating`, for your own.

    `start` and `finish` serve stacks with `split_dim=None`: by default the input goes on both
    streams and their mean comes out.
    """

    needs_grid = False  # works on the exact grid only
    growth = 1.0  # the factor by which a step's inverse multiplies an error; 0 if it makes none
    bits: int | None = None  # of the grid 2^-bits, if the coupling is exact

    @abstractmethod
    def forward(self, a: Tensor, b: Tensor, f: Tensor) -> Streams:
        """The step, by ordinary differentiable operations."""

    @abstractmethod
    def recover(self, a_out: Tensor, b_out: Tensor) -> Tensor:
        """The stream `b` that the block saw."""

    @abstractmethod
    def inverse(self, a_out: Tensor, b_out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        """The stream `a`."""

    def start(self, x: Tensor) -> Streams:
        return x, x

    def finish(self, a: Tensor, b: Tensor) -> Tensor:
        return (a + b) / 2

    def branch_shape(self, stream: torch.Size) -> torch.Size:
        """The shape a block has to return for a stream of shape `stream`."""
        return stream

    def on_grid(self, bits: int) -> Coupling:
        """This coupling made exact on the grid of 2^-bits; ValueError where that cannot be."""
        raise ValueError(
            f"grid_bits={bits}: {type(self).__name__.lower()} cannot be exact, since its inverse divides or multiplies;"
            " exact are additive, midpoint, leapfrog and bdia"
        )

    def bind(self, a: Tensor, b: Tensor, training: bool) -> Coupling:
        """The coupling of one step of one forward, for those that draw or remember; called after the block."""
        return self

    def limit(self, dtype: torch.dtype) -> float:
        """Return what the absolute values of streams must stay below; infinity if the coupling is not exact."""
        return math.inf

    def invertible(self, training: bool) -> bool:
        """Whether steps can be undone; where not, backward needs what autograd stores."""
        return True


class Alternating(Coupling):
    """(a, b) -> (b, combine(a, b, f)): the streams take turns, so that two callables say all.

    >>> @dataclass(frozen=True)
    ... class Mirrored(Alternating):
    ...     def combine(self, a, b, f): return f - a
    ...     def solve(self, out, b, f): return f - out
    >>> stack = ReversibleSequential(*blocks, coupling=Mirrored())
    """

    @abstractmethod
    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        """The new stream. All shapes are the stream's, but f's, which is `branch_shape`."""

    @abstractmethod
    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        """`out = combine(a, b, f)` solved for a."""

    def forward(self, a: Tensor, b: Tensor, f: Tensor) -> Streams:
        return b, self.combine(a, b, f)

    def recover(self, a_out: Tensor, b_out: Tensor) -> Tensor:
        return a_out

    def inverse(self, a_out: Tensor, b_out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.solve(b_out, b, f)
