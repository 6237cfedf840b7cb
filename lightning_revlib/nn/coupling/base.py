"""Couplings: invertible functions that join a block's output to two streams.

With f = block(b), a coupling defines:

    forward(a, b, f)      -> (a', b')    the step
    recover(a', b')       -> b           the block's input, computed without the block
    inverse(a', b', b, f) -> a           the other stream, computed from the block's output
    start(x)              -> (a, b)      the streams of one input     (split_dim=None)
    finish(a, b)          -> y           the output of two streams    (split_dim=None)

A coupling never defines a gradient: autograd derives it from `forward`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from operator import mul
from typing import Any, TypeAlias

import torch
from torch import Tensor

Streams: TypeAlias = tuple[Tensor, Tensor]


def has_gaps(stream: Tensor) -> bool:
    """Return True if the stream is a view with gaps, in any order of its dimensions."""
    if stream.is_contiguous():
        return False
    strides = stream.stride()
    return sum(map(mul, stream.shape, strides)) - sum(strides) + 1 != stream.numel()


def dense(stream: Tensor) -> Tensor:
    """Return the stream without gaps in memory, in the same order of dimensions: as streams between blocks are.

    Kernels, what they save and how they round, depend on how memory is laid out.
    """
    return stream.clone() if has_gaps(stream) else stream


class Coupling(ABC):
    """Base class of all couplings.

    Subclass `Alternating` if your coupling leaves b as it is, and this class otherwise. Stacks with
    `split_dim=None` call `start` and `finish`: by default the input is both streams, and the output
    is the mean of both. Register a coupling's name in `COUPLINGS`, or pass an instance of it.
    """

    needs_grid = False  # True: the coupling needs `grid_bits`
    growth = 1.0  # factor by which a step's inverse multiplies the streams' error; 0 if the inverse is exact
    bits: int | None = None  # of the grid 2^-bits, if the coupling is exact
    kept_bits: int = 0  # those that each step keeps for each element of a stream

    @abstractmethod
    def forward(self, a: Tensor, b: Tensor, f: Tensor) -> Streams:
        """Return the new streams, computed by differentiable operations."""

    @abstractmethod
    def recover(self, a_out: Tensor, b_out: Tensor) -> Tensor:
        """Return the stream b, which was the block's input."""

    @abstractmethod
    def inverse(self, a_out: Tensor, b_out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        """Return the stream a."""

    def start(self, x: Tensor) -> Streams:
        return x, x

    def finish(self, a: Tensor, b: Tensor) -> Tensor:
        return (a + b) / 2

    def branch_shape(self, stream: torch.Size) -> torch.Size:
        """Return the shape that a block must return for a stream of shape `stream`."""
        return stream

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let `torch.load` read couplings among a checkpoint's hyperparameters with weights_only=True."""
        super().__init_subclass__(**kwargs)
        torch.serialization.add_safe_globals([cls])

    def on_grid(self, bits: int) -> Coupling:
        """Return this coupling on the grid of multiples of 2^-bits. Raises ValueError if it cannot be exact."""
        raise ValueError(
            f"grid_bits={bits}: {type(self).__name__.lower()} cannot be exact, since it multiplies by any number; exact"
            " are additive, midpoint, leapfrog, bdia, and momentum and scaled with a power of two"
        )

    def bind(self, a: Tensor, b: Tensor, training: bool) -> Coupling:
        """Return the coupling of one step of one forward; override it to draw numbers or to keep state."""
        return self

    def limit(self, dtype: torch.dtype) -> float:
        """Return what the absolute values of streams must stay below; infinity if the coupling is not exact."""
        return math.inf

    def invertible(self, training: bool) -> bool:
        """Return True if the step has an inverse; if not, autograd stores its tensors."""
        return True


class Alternating(Coupling):
    """(a, b) -> (b, combine(a, b, f)): the streams take turns, and a subclass defines two methods only.

    >>> @dataclass(unsafe_hash=True)
    ... class Mirrored(Alternating):
    ...     def combine(self, a, b, f): return f - a
    ...     def solve(self, out, b, f): return f - out
    >>> stack = ReversibleSequential(*blocks, coupling=Mirrored())
    """

    @abstractmethod
    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        """Return the new stream. f has the shape `branch_shape`, all others the stream's."""

    @abstractmethod
    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        """Return a, the solution of `out = combine(a, b, f)`."""

    def forward(self, a: Tensor, b: Tensor, f: Tensor) -> Streams:
        return b, self.combine(a, b, f)

    def recover(self, a_out: Tensor, b_out: Tensor) -> Tensor:
        return a_out

    def inverse(self, a_out: Tensor, b_out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.solve(b_out, b, f)
