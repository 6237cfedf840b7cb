"""Drift: how far backward's reconstruction of a stack's input is from the input itself, expected and measured."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_revlib.nn.coupling import Coupling

SAMPLE = 256  # elements a stream, at most; never more than one in 512


class Sentinel:
    """A small sample of both streams at a stack's entrance, to be compared with their reconstruction.

    `error(taken)` gives |taken - sample| / |sample| in the 2-norm for what `take` took from the reconstruction, as a
    tensor on the streams' device.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.sample = self.take(a, b)

    @staticmethod
    def take(*streams: Tensor) -> Tensor:
        places = _places(streams[0])
        if all(map(Tensor.is_contiguous, streams)):
            size, stride = (len(places),), (places.step,)
            return torch.cat([s.as_strided(size, stride, s.storage_offset()) for s in streams])
        index = torch.arange(places.start, places.stop, places.step, device=streams[0].device)
        return torch.cat([stream.take(index) for stream in streams])

    def error(self, taken: Tensor) -> Tensor:
        norm = self.sample.norm().clamp_min(torch.finfo(self.sample.dtype).tiny)
        return (taken - self.sample).norm() / norm

    @staticmethod
    def bytes(stream: Tensor) -> int:
        """What it takes at most, for streams like this one: its sample, another, their difference, and indices."""
        return len(_places(stream)) * (6 * stream.element_size() + 8) + 64


def _places(stream: Tensor) -> range:
    count = stream.numel()
    return range(0, count, max(1, count // max(8, min(SAMPLE, count // 512))) | 1)  # odd: not one column for ever


def expected_drift(coupling: Coupling, depth: int, dtype: torch.dtype) -> float:
    """The order of the drift to expect after `depth` steps, from above: eps (1 + g + ... + g^(depth - 1)).

    g is the coupling's `growth`, eps the rounding of streams of `dtype`. Blocks that amplify what
    they get add to it.
    """
    eps, g = torch.finfo(dtype).eps, coupling.growth
    if g in (0.0, 1.0, math.inf):
        return eps * depth * g
    return eps * math.expm1(min(depth * math.log(g), 700)) / (g - 1)
