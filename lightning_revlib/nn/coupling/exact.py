"""Exact couplings: streams on a grid of multiples of 2^-bits, on which additions do not round.

(a, b) -> (b, carry(a, b) + Q(contribution(f)))       Exact, made from additive, midpoint, leapfrog
x+ = g (x- + s u) + Q((1 - g) x + (1 + g) f(x))       BDIA
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_revlib.nn.coupling.base import Alternating, Coupling, Streams


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


@dataclass(unsafe_hash=True)
class BDIA(Coupling):
    """x+ = g (x- + s u) + Q((1 - g) x + (1 + g) f(x)), with g = gamma or -gamma, drawn for each sample and step.

    The streams are (x-, x), u = 2^-bits, and Q rounds to multiples of u. The parity s = (x- / u) mod 2
    makes the first term a multiple of u. A step keeps its parities, one bit an element, and its inverse
    x- = (x+ - Q(...)) / g - s u is exact. In evaluation g = 0, which is the plain residual network
    x + Q(f(x)); backward of it needs stored activations.

    Use it, with `grid_bits` and best with `split_dim=None`, to train a residual architecture that is
    used unchanged in evaluation. Do not use it if one bit for each element and block is too much.
    BDIA-transformer, https://arxiv.org/abs/2407.09093.
    """

    gamma: float = 0.5
    bits: int | None = None
    needs_grid = True
    growth = 0.0

    def __post_init__(self) -> None:
        if self.gamma != 0.5:
            raise ValueError(f"gamma={self.gamma!r}: bdia keeps one bit an element, which is enough for 0.5 only")

    def on_grid(self, bits: int) -> Coupling:
        return BDIA(self.gamma, bits)

    def limit(self, dtype: torch.dtype) -> float:
        assert self.bits is not None
        return grid_limit(dtype, self.bits) / 2

    def bind(self, a: Tensor, b: Tensor, training: bool) -> Coupling:
        assert self.bits is not None
        if not training:
            return _BDIAStep(a.new_zeros(()), None, self.bits)
        with torch.no_grad():
            sign = torch.randint(0, 2, (len(a), *[1] * (a.ndim - 1)), device=a.device).to(a.dtype) * 2 - 1
            odd = (a * 2.0**self.bits).remainder(2) != 0
            return _BDIAStep(sign * self.gamma, _pack_bits(odd), self.bits)

    def invertible(self, training: bool) -> bool:
        return training

    def forward(self, a: Tensor, b: Tensor, f: Tensor) -> Streams:
        return self.bind(a, b, True).forward(a, b, f)

    def recover(self, a_out: Tensor, b_out: Tensor) -> Tensor:
        raise ValueError("bdia has no inverse from its output alone: that takes the bits which its forward has kept")

    def inverse(self, a_out: Tensor, b_out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.recover(a_out, b_out)

    def finish(self, a: Tensor, b: Tensor) -> Tensor:
        return b


@dataclass(frozen=True)
class _BDIAStep(Alternating):
    """One step of BDIA, with its draw and its parities."""

    gamma: Tensor  # (batch, 1, ...), or a zero in evaluation
    odd: Tensor | None  # parities of x-, eight a byte; None in evaluation
    bits: int

    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        if self.odd is None:
            return round_to_grid(b + f.to(b.dtype), self.bits)
        return self.gamma * (a + self._parity(a)) + self._rest(b, f)

    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return (out - self._rest(b, f)) / self.gamma - self._parity(out)

    def _rest(self, b: Tensor, f: Tensor) -> Tensor:
        return round_to_grid((1 - self.gamma) * b + (1 + self.gamma) * f.to(b.dtype), self.bits)

    def _parity(self, like: Tensor) -> Tensor:
        assert self.odd is not None
        return _unpack_bits(self.odd, like.shape).to(like.dtype) * 2.0**-self.bits


class _Round(torch.autograd.Function):
    """Round to multiples of 1 / scale, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        return (x * scale).round_().div_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def round_to_grid(x: Tensor, bits: int) -> Tensor:
    """Round x to multiples of 2^-bits, with the gradient of the identity."""
    return _Round.apply(x, 2.0**bits)


def grid_limit(dtype: torch.dtype, bits: int) -> float:
    """Return the bound below which `dtype` represents every multiple of 2^-bits."""
    mantissa = {torch.float32: 24, torch.float64: 53}.get(dtype)
    if mantissa is None:
        raise ValueError(f"grid_bits={bits} needs streams of float32 or float64, not {dtype}; set stream_dtype")
    return 2.0 ** (mantissa - bits)


def _pack_bits(bits: Tensor) -> Tensor:
    """Return the booleans packed, eight a byte."""
    flat = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8)
    return (flat * _weights(bits.device)).sum(1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, shape: torch.Size) -> Tensor:
    flat = packed.unsqueeze(1).bitwise_and(_weights(packed.device)).ne(0).flatten()
    return flat[: shape.numel()].view(shape)


def _weights(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
