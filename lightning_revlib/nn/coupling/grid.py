"""Numbers on the grid of multiples of 2^-bits: rounding to it, its limit, and the last bits that a factor forgets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_FORGOTTEN = 8  # bits of a number that a step may forget, and keep


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


def forgotten_bits(name: str, factor: float) -> int:
    """Return k for a factor of +-2^-k: multiplied by it, a number on the grid forgets its last k bits.

    Raises ValueError for another factor; `name` is the option's.
    """
    if factor == 0:
        raise ValueError(f"{name}={factor!r} has no inverse, and needs no grid: leave out grid_bits")
    mantissa, exponent = math.frexp(abs(factor))
    if mantissa == 0.5 and 0 <= 1 - exponent <= MOST_FORGOTTEN:
        return 1 - exponent
    lower = min(max(exponent - 1, -MOST_FORGOTTEN), -1)
    near = [math.copysign(2.0**power, factor) for power in (lower, lower + 1)]
    raise ValueError(
        f"{name}={factor!r}: on the grid it must be a power of two; the nearest are {near[0]} and {near[1]}, and"
        f" 2^-{MOST_FORGOTTEN} is the least"
    )


@dataclass(frozen=True)
class Remainder:
    """The last bits of a stream's numbers on the grid, as a number between 0 and 2^count - 1, packed bit by bit."""

    planes: tuple[Tensor, ...]  # of each bit, eight numbers a byte
    bits: int

    @classmethod
    def of(cls, stream: Tensor, bits: int, count: int) -> Remainder:
        with torch.no_grad():
            left = (stream * 2.0**bits).remainder_(2.0**count).to(torch.uint8)
            return cls(tuple(_pack(left.bitwise_and(1 << n).ne(0)) for n in range(count)), bits)

    def unpack(self, like: Tensor) -> Tensor:
        """Return the remainder of a stream with the shape and dtype of `like`."""
        left = torch.zeros_like(like, requires_grad=False)
        for n, plane in enumerate(self.planes):
            left.add_(_unpack(plane, like.shape), alpha=2.0 ** (n - self.bits))
        return left


def _pack(bits: Tensor) -> Tensor:
    """Return the booleans packed, eight a byte."""
    flat = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8)
    return (flat * _weights(bits.device)).sum(1, dtype=torch.uint8)


def _unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    flat = packed.unsqueeze(1).bitwise_and(_weights(packed.device)).ne(0).flatten()
    return flat[: shape.numel()].view(shape)


def _weights(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
