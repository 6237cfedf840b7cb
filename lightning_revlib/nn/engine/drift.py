"""Drift: the difference between a stack's input and backward's reconstruction of it, expected and measured."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.linalg import vector_norm

from lightning_revlib.nn.coupling.base import Coupling
from lightning_revlib.nn.state.tensors import is_fake, values_of

LONGEST_ROW = 1025  # numbers in a row
_ALL = torch.tensor([(-1.0) ** bin(n & n >> 1).count("1") for n in range(LONGEST_ROW)], device="cpu")
SIGNS = {4**k + 1: _ALL[: 4**k + 1] / 2**k for k in range(1, 6)} | {1: _ALL[:1]}  # by length, see `_signs`


class Sentinel:
    """Sums of both streams at a stack's entrance, to be compared with those of the streams that backward rebuilds.

    A stream is read once, in rows. One sum of each row is kept, its numbers having the signs of `_signs`. No element is
    left out, and the sums of an error have the 2-norm of the error, to some 10 %.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.orders = [_order(t) for t in map(values_of, (a, b))]
        self.sums = self._sums(a, b)

    def error(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the relative error of rebuilt streams in the 2-norm, on their device; absolute if all were zero."""
        size = vector_norm(self.sums)
        return vector_norm(self._sums(a, b) - self.sums) / (size + (size == 0))

    @staticmethod
    def bytes(stream: Tensor) -> int:
        """Return the most bytes that a sentinel of such streams needs: its sums, those of backward, and signs."""
        length = _row_length(stream.numel())
        return 6 * (stream.numel() // length + 1) * stream.element_size() + 16 * length + 64

    def _sums(self, *given: Tensor) -> Tensor:
        streams = [values_of(t) for t in given]
        length = _row_length(streams[0].numel())
        signs = _signs(length, streams[0])
        sums = []
        for stream, order in zip(streams, self.orders, strict=True):
            flat = (stream if order is None else stream.permute(order)).reshape(-1)
            count = flat.numel() // length
            rows, rest = flat.as_strided((count, length), (length, 1)), flat[count * length :]
            sums.append(each := flat.new_empty(count + 1))
            # Without `out`, autocast would cast the whole stream.
            torch.mv(rows, signs, out=each[:count])
            torch.dot(rest, signs[: rest.numel()], out=each[count])
        return torch.cat(sums)


def _order(stream: Tensor) -> list[int] | None:
    """Return the dimensions as they lie in memory, None if in order: a rebuilt stream may be laid out otherwise."""
    return None if stream.is_contiguous() else sorted(range(stream.ndim), key=stream.stride, reverse=True)


def _row_length(size: int) -> int:
    """Return the numbers in a row of a stream, 1 or 4^k + 1 up to 1025: a large stream has 32 rows or more.

    With an odd length, an error that repeats from sample to sample meets other signs in each row.
    """
    k = min(5, max(0, (size // 32).bit_length() - 1) // 2)
    return 4**k + 1 if k else 1


def _signs(length: int, like: Tensor) -> Tensor:
    """Return signs for the numbers in a row, each over 2^k: those of Rudin and Shapiro, https://oeis.org/A020985.

    s(n) = (-1)^(number of "11" in n, in binary). The first 4^k of them add up to 2^k, as large a sum as of random
    signs, and no periodic pattern of numbers has a sum beyond 3.42 times that.
    """
    if like.is_cpu and not is_fake(like):
        return SIGNS[length].to(like.dtype)
    n = torch.arange(length, dtype=torch.int16, device=like.device)  # a copy to the device would wait for it
    odd = n & n >> 1
    for shift in (8, 4, 2, 1):  # the lowest bit becomes the parity of all
        odd ^= odd >> shift
    return (1 - 2 * (odd & 1)).to(like.dtype) / math.isqrt(length)


def expected_drift(coupling: Coupling, depth: int, dtype: torch.dtype) -> float:
    """Return a bound of the drift's order of magnitude after `depth` steps: eps (1 + g + ... + g^(depth - 1)).

    g is the coupling's `growth`, and eps is the rounding of streams of `dtype`. Blocks that amplify their input add to
    the drift.
    """
    eps, g = torch.finfo(dtype).eps, coupling.growth
    if g in (0.0, 1.0, math.inf):
        return eps * depth * g
    return eps * math.expm1(min(depth * math.log(g), 700)) / (g - 1)
