"""Exact couplings: streams on a grid of multiples of u = 2^-bits, on which additions do not round.

(a, b) -> (b, carry(a, b) + Q(contribution(f)))               Exact, made from additive, midpoint, leapfrog
(a, b) -> (b, s (a - r) + Q(f))                               ExactScaledStep, made from scaled
v' = g (v - r) + Q((1 - g) f(x)), x' = x + v'                 ExactMomentumStep, made from momentum

Q rounds to the grid. 2^-k times a number on the grid is on the grid only if the number's last k bits are zero. These
bits are r, the remainder of the number divided by 2^k u. A step takes r off (BDIA adds it), and keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_revlib.nn.coupling.base import Alternating, Coupling, Streams
from lightning_revlib.nn.coupling.grid import Remainder, grid_limit, round_to_grid


class Summing(Alternating):
    """(a, b) -> (b, carry(a, b) + contribution(f)), with carry its own inverse in a.

    Base class of the couplings that `on_grid` can make exact.
    """

    headroom = 1  # factor by which intermediate results may exceed the streams

    def carry(self, a: Tensor, b: Tensor) -> Tensor:
        return a

    def contribution(self, f: Tensor) -> Tensor:
        return f

    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.carry(a, b) + self.contribution(f)

    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.carry(out - self.contribution(f), b)

    def on_grid(self, bits: int) -> Coupling:
        return Exact(self, bits)


@dataclass(frozen=True)
class Exact(Alternating):
    """(a, b) -> (b, carry(a, b) + Q(contribution(f))), with Q rounding to multiples of 2^-bits.

    In float32 every addition on the grid is exact while |x| < 2^(24 - bits). The streams are therefore
    rebuilt to the last bit, and gradients equal those of stored activations to the last bit. The
    gradient of Q is the identity. Made by `on_grid`.
    """

    inner: Summing
    bits: int
    growth = 0.0

    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.inner.carry(a, b) + self._contribution(b, f)

    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.inner.carry(out - self._contribution(b, f), b)

    def start(self, x: Tensor) -> Streams:
        return self.inner.start(x)

    def finish(self, a: Tensor, b: Tensor) -> Tensor:
        return self.inner.finish(a, b)

    def limit(self, dtype: torch.dtype) -> float:
        """Return the bound that the streams' absolute values must stay below."""
        return grid_limit(dtype, self.bits) / self.inner.headroom

    def _contribution(self, b: Tensor, f: Tensor) -> Tensor:
        return round_to_grid(self.inner.contribution(f.to(b.dtype)), self.bits)


class Remembering(Coupling):
    """A coupling on the grid that multiplies stream a by a factor of +-2^-k, and keeps the k bits that are lost.

    `bind` returns the coupling of one step, with the bits of that step. `limit` leaves room for the sum of two streams.
    """

    growth = 0.0

    def forward(self, a: Tensor, b: Tensor, f: Tensor) -> Streams:
        return self.bind(a, b, True).forward(a, b, f)

    def recover(self, a_out: Tensor, b_out: Tensor) -> Tensor:
        raise ValueError(
            f"coupling {self} has no inverse from its output alone, which lacks the bits that forward kept; for"
            " stack.inverse take another coupling, such as additive"
        )

    def inverse(self, a_out: Tensor, b_out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.recover(a_out, b_out)

    def limit(self, dtype: torch.dtype) -> float:
        assert self.bits is not None
        return grid_limit(dtype, self.bits) / 2


@dataclass(unsafe_hash=True)
class ExactScaling(Remembering):
    """The coupling `inner`, which multiplies stream a by `factor`, on the grid. Its steps are of the class `step`."""

    inner: Coupling
    factor: float
    step: type[ExactScaledStep] = field(repr=False)
    kept_bits: int = 0
    bits: int = 0

    def bind(self, a: Tensor, b: Tensor, training: bool) -> Coupling:
        return self.step(self.factor, Remainder.of(a, self.bits, self.kept_bits), self.bits)

    def start(self, x: Tensor) -> Streams:
        a, b = self.inner.start(x)
        return (a if a is x else round_to_grid(a, self.bits)), b

    def finish(self, a: Tensor, b: Tensor) -> Tensor:
        return self.inner.finish(a, b)


@dataclass(frozen=True)
class ExactScaledStep(Alternating):
    """(a, b) -> (b, s (a - r) + Q(f)); inverse a = (b' - Q(f)) / s + r."""

    factor: float
    remainder: Remainder
    bits: int

    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.factor * (a - self.remainder.unpack(a)) + round_to_grid(f.to(a.dtype), self.bits)

    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return (out - round_to_grid(f.to(out.dtype), self.bits)) / self.factor + self.remainder.unpack(out)


@dataclass(frozen=True)
class ExactMomentumStep(ExactScaledStep):
    """v' = g (v - r) + Q((1 - g) f(x)), x' = x + v'; inverse x = x' - v', v = (v' - Q((1 - g) f)) / g + r."""

    def forward(self, a: Tensor, b: Tensor, f: Tensor) -> Streams:
        v = self.combine(a, b, (1 - self.factor) * f.to(a.dtype))
        return v, b + v

    def recover(self, a_out: Tensor, b_out: Tensor) -> Tensor:
        return b_out - a_out

    def inverse(self, a_out: Tensor, b_out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.solve(a_out, b, (1 - self.factor) * f.to(b.dtype))
