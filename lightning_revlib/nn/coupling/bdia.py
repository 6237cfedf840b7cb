"""BDIA: a residual network in evaluation, and in training two streams on the grid, with a sign drawn for each step.

x+ = g (x- + r) + Q((1 - g) x + (1 + g) f(x)), with g = gamma or -gamma; Q and r are those of `exact`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_revlib.nn.coupling.base import Alternating, Coupling
from lightning_revlib.nn.coupling.exact import Remembering
from lightning_revlib.nn.coupling.grid import Remainder, round_to_grid


@dataclass(unsafe_hash=True)
class BDIA(Remembering):
    """x+ = g (x- + s u) + Q((1 - g) x + (1 + g) f(x)), with g = gamma or -gamma, drawn for each sample and step.

    The streams are (x-, x), u = 2^-bits, and Q rounds to multiples of u. The parity s = (x- / u) mod 2
    makes the first term a multiple of u. A step keeps its parities, one bit per element, and its inverse
    x- = (x+ - Q(...)) / g - s u is exact. In evaluation g = 0, which is the plain residual network
    x + Q(f(x)); backward of it needs stored activations.

    Use it, with `grid_bits` and best with `split_dim=None`, to train a residual architecture that is
    used unchanged in evaluation. Do not use it if one bit for each element and block is too much.
    BDIA-transformer, https://arxiv.org/abs/2407.09093.
    """

    gamma: float = 0.5
    bits: int | None = None
    needs_grid = True
    kept_bits = 1

    def __post_init__(self) -> None:
        if self.gamma != 0.5:
            raise ValueError(f"gamma={self.gamma!r}: bdia keeps one bit an element, which is enough for 0.5 only")

    def on_grid(self, bits: int) -> Coupling:
        return BDIA(self.gamma, bits)

    def bind(self, a: Tensor, b: Tensor, training: bool) -> Coupling:
        if not training or self.bits is None:
            return _BDIAStep(0, None, self.bits)
        with torch.no_grad():
            sign = torch.randint(0, 2, (len(a), *[1] * (a.ndim - 1)), device=a.device).to(a.dtype) * 2 - 1
            return _BDIAStep(sign * self.gamma, Remainder.of(a, self.bits, 1), self.bits)

    def invertible(self, training: bool) -> bool:
        return training

    def finish(self, a: Tensor, b: Tensor) -> Tensor:
        return b


@dataclass(frozen=True)
class _BDIAStep(Alternating):
    """One step of BDIA, with its draw and its parities."""

    gamma: Tensor | float  # (batch, 1, ...), or 0 in evaluation
    parity: Remainder | None  # of x-; None in evaluation
    bits: int | None  # None while `grid_bits="auto"` looks for them

    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        rest = self._rest(b, f)
        return rest if self.parity is None else self.gamma * (a + self.parity.unpack(a)) + rest

    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        assert self.parity is not None
        return (out - self._rest(b, f)) / self.gamma - self.parity.unpack(out)

    def _rest(self, b: Tensor, f: Tensor) -> Tensor:
        rest = (1 - self.gamma) * b + (1 + self.gamma) * f.to(b.dtype)
        return rest if self.bits is None else round_to_grid(rest, self.bits)
