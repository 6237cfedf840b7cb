"""The couplings by name, each with its equation, its inverse and its paper.

Their drift is in docs/measurements/figures.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_revlib.nn.coupling.base import Alternating, Coupling, Streams
from lightning_revlib.nn.coupling.exact import ExactMomentumStep, ExactScaledStep, ExactScaling, Summing
from lightning_revlib.nn.coupling.grid import forgotten_bits


@dataclass(unsafe_hash=True)
class Additive(Summing):
    """(a, b) -> (b, a + f); inverse a = b' - f.

    The default: no step multiplies the reconstruction error. RevNet, https://arxiv.org/abs/1707.04585.
    """


@dataclass(unsafe_hash=True)
class Affine(Alternating):
    """(a, b) -> (b, a exp(s) + t) with (s, t) = f split in two and s bounded; inverse a = (b' - t) exp(-s).

    A block returns twice its input's size along `dim`. The bound s = bound tanh(s / bound) limits the
    factor of a step to between e^-bound and e^bound. A stream that is scaled down loses digits: deep
    float32 stacks drift more than additive ones. Use it for normalizing flows, and for blocks that scale a stream.
    RealNVP, https://arxiv.org/abs/1605.08803.
    """

    dim: int = 1
    bound: float = 1.0

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"bound={self.bound!r}: the largest log-scale of a step must be positive; 1.0 is usual")

    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        s, t = f.chunk(2, self.dim)
        return a * torch.exp(self._bounded(s)) + t

    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        s, t = f.chunk(2, self.dim)
        return (out - t) * torch.exp(-self._bounded(s))

    def branch_shape(self, stream: torch.Size) -> torch.Size:
        shape = list(stream)
        shape[self.dim] *= 2
        return torch.Size(shape)

    def _bounded(self, s: Tensor) -> Tensor:
        return self.bound * torch.tanh(s / self.bound)


@dataclass(unsafe_hash=True)
class Momentum(Coupling):
    """v' = gamma v + (1 - gamma) f(x), x' = x + v'; inverse x = x' - v', v = (v' - (1 - gamma) f) / gamma.

    The streams are (v, x), and the block's input is x. With `split_dim=None`, v starts at zero or at `init(x)`, and
    the output is x; an `init` with parameters must be a module of your model, too, or they are not trained. Each
    step of the inverse multiplies the error of v by 1 / gamma: do not use a small gamma in a deep stack
    (docs/measurements/figures.md has the drift by depth), unless gamma = 2^-k and `grid_bits` is set: a step then
    keeps the k bits of each element that it would forget, and its inverse is exact. With gamma 0 it is the plain
    residual network, whose activations are stored. Momentum ResNet, https://arxiv.org/abs/2102.07870.
    """

    gamma: float = 0.9
    init: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma!r}: momentum has an inverse for 0 < gamma <= 1 only; 0.9 is usual")

    def invertible(self, training: bool) -> bool:
        return self.gamma > 0

    @property
    def growth(self) -> float:  # type: ignore[override]
        return 1 / self.gamma if self.gamma else math.inf

    def on_grid(self, bits: int) -> Coupling:
        return ExactScaling(self, self.gamma, ExactMomentumStep, forgotten_bits("gamma", self.gamma), bits)

    def forward(self, a: Tensor, b: Tensor, f: Tensor) -> Streams:
        v = self.gamma * a + (1 - self.gamma) * f
        return v, b + v

    def recover(self, a_out: Tensor, b_out: Tensor) -> Tensor:
        return b_out - a_out

    def inverse(self, a_out: Tensor, b_out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return (a_out - (1 - self.gamma) * f) / self.gamma

    def start(self, x: Tensor) -> Streams:
        return (torch.zeros_like(x) if self.init is None else self.init(x)), x

    def finish(self, a: Tensor, b: Tensor) -> Tensor:
        return b


@dataclass(unsafe_hash=True)
class Midpoint(Summing):
    """(x-, x) -> (x, x- + 2h f(x)); inverse x- = x+ - 2h f(x).

    The midpoint rule for x' = f(x) with step size `h`: as stable as additive. With `split_dim=None`
    the input is both points, and the output is the last point. Reversible architectures for
    arbitrarily deep residual networks, https://arxiv.org/abs/1709.03698.
    """

    h: float = 0.5

    def __post_init__(self) -> None:
        _nonzero("h", self.h)

    def contribution(self, f: Tensor) -> Tensor:
        return 2 * self.h * f

    def finish(self, a: Tensor, b: Tensor) -> Tensor:
        return b


@dataclass(unsafe_hash=True)
class Leapfrog(Summing):
    """(x-, x) -> (x, 2x - x- + h^2 f(x)); inverse x- = 2x - x+ + h^2 f(x).

    The leapfrog rule for x'' = f(x) with step size `h`. Without a restoring force the state grows
    linearly with depth: do not use it for blocks with large outputs. With `split_dim=None` the input
    is both points, and the output is the last point. https://arxiv.org/abs/1709.03698.
    """

    h: float = 1.0
    headroom = 4

    def __post_init__(self) -> None:
        _nonzero("h", self.h)

    def carry(self, a: Tensor, b: Tensor) -> Tensor:
        return 2 * b - a

    def contribution(self, f: Tensor) -> Tensor:
        return self.h**2 * f

    def finish(self, a: Tensor, b: Tensor) -> Tensor:
        return b


@dataclass(unsafe_hash=True)
class Scaled(Alternating):
    """(a, b) -> (b, scale a + f); inverse a = (b' - f) / scale.

    For fine-tuning: with a small scale the function of a pretrained network changes little. f is the
    whole block with its skip connection, so leave out `residual=True`. With `split_dim=None` the
    output is b. Each step of the inverse multiplies the error by 1 / scale: do not use a small scale
    in a deep stack, unless scale = 2^-k and `grid_bits` is set, as for momentum. With scale 0 it is the
    original network, whose activations are stored. MEFT, https://arxiv.org/abs/2306.00477.
    """

    scale: float = 0.9

    def invertible(self, training: bool) -> bool:
        return self.scale != 0

    @property
    def growth(self) -> float:  # type: ignore[override]
        return max(1.0, 1 / abs(self.scale)) if self.scale else math.inf

    def on_grid(self, bits: int) -> Coupling:
        return ExactScaling(self, self.scale, ExactScaledStep, forgotten_bits("scale", self.scale), bits)

    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.scale * a + f

    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return (out - f) / self.scale

    def finish(self, a: Tensor, b: Tensor) -> Tensor:
        return b


def _nonzero(name: str, value: float) -> None:
    if value == 0:
        raise ValueError(f"{name}={value!r}: the step would have no inverse; take a number other than zero")
