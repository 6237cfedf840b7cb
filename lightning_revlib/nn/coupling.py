"""Couplings: how a block's output joins two streams so that the step can be undone.

With f = block(b), a coupling states four things:

    forward(a, b, f)      -> (a', b')    the step
    recover(a', b')       -> b           what the block saw, found without the block
    inverse(a', b', b, f) -> a           the other stream, found with the block's output
    start(x) -> (a, b), finish(a, b) -> y    one stream in, one out (split_dim=None)

A coupling never states a gradient: autograd derives it from `forward`.
"""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Streams: TypeAlias = tuple[Tensor, Tensor]


class Coupling(ABC):
    """Base of all couplings; subclass it, or `Alternating`, for your own.

    `start` and `finish` serve stacks with `split_dim=None`: by default the input goes on both
    streams and their mean comes out.
    """

    needs_grid = False  # works on the exact grid only

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

    def at(self, a: Tensor, b: Tensor, training: bool) -> Coupling:
        """The coupling of one step of one forward, for those that draw or remember; called after the block."""
        return self

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


class Summing(Alternating):
    """(a, b) -> (b, carry(a, b) + contribution(f)), where carry is its own inverse in a: can be made exact."""

    headroom = 1  # by how much intermediate results may exceed the streams

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
    """(a, b) -> (b, carry(a, b) + Q(contribution(f))), Q rounding to multiples of 2^-bits; exact inverse.

    On the grid every addition is exact while |x| < 2^(24 - bits) in float32, so that reconstruction
    is bit for bit, and so are gradients. The gradient passes straight through Q. Made by `on_grid`.
    """

    inner: Summing
    bits: int

    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.inner.carry(a, b) + self._contribution(b, f)

    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.inner.carry(out - self._contribution(b, f), b)

    def start(self, x: Tensor) -> Streams:
        return self.inner.start(x)

    def finish(self, a: Tensor, b: Tensor) -> Tensor:
        return self.inner.finish(a, b)

    def limit(self, dtype: torch.dtype) -> float:
        """What streams must stay below, in absolute value."""
        return grid_limit(dtype, self.bits) / self.inner.headroom

    def _contribution(self, b: Tensor, f: Tensor) -> Tensor:
        return round_to_grid(self.inner.contribution(f.to(b.dtype)), self.bits)


@dataclass(frozen=True)
class Additive(Summing):
    """(a, b) -> (b, a + f); inverse a = b' - f.

    The default: its reconstruction error only adds up. RevNet, https://arxiv.org/abs/1707.04585.
    """


@dataclass(frozen=True)
class Momentum(Coupling):
    """v' = gamma v + (1 - gamma) f(x), x' = x + v'; inverse x = x' - v', v = (v' - (1 - gamma) f) / gamma.

    The streams are (v, x) and the block always sees x. With `split_dim=None`, v starts at zero or
    at `init(x)`, and x comes out. Each step multiplies the reconstruction's error by 1 / gamma
    (float32, 24 blocks: about 1e-7 at 0.99, 8e-6 at 0.9), so not for deep stacks with small
    gamma. Momentum ResNet, https://arxiv.org/abs/2102.07870.
    """

    gamma: float = 0.9
    init: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma!r}: momentum has an inverse for 0 < gamma <= 1 only; 0.9 is usual")

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


@dataclass(frozen=True)
class Affine(Alternating):
    """(a, b) -> (b, a exp(s) + t) with (s, t) = f split in two and s bounded; inverse a = (b' - t) exp(-s).

    A block returns twice its input's size along `dim`. s = bound tanh(s / bound) keeps a step from
    scaling by more than e^bound, up or down; what is scaled down loses digits, so that deep float32
    stacks drift more than additive ones. For flows and where a step should gate. RealNVP,
    https://arxiv.org/abs/1605.08803.
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


@dataclass(frozen=True)
class Midpoint(Summing):
    """(x-, x) -> (x, x- + 2h f(x)); inverse x- = x+ - 2h f(x).

    The midpoint rule for x' = f(x) with step `h`: as stable as additive. With `split_dim=None` the
    input is taken for both points and the last one comes out. Reversible architectures for
    arbitrarily deep residual networks, https://arxiv.org/abs/1709.03698.
    """

    h: float = 0.5

    def __post_init__(self) -> None:
        _nonzero("h", self.h)

    def contribution(self, f: Tensor) -> Tensor:
        return 2 * self.h * f

    def finish(self, a: Tensor, b: Tensor) -> Tensor:
        return b


@dataclass(frozen=True)
class Leapfrog(Summing):
    """(x-, x) -> (x, 2x - x- + h^2 f(x)); inverse x- = 2x - x+ + h^2 f(x).

    The leapfrog rule for x'' = f(x) with step `h`. Without a restoring force the state grows
    linearly with depth, so not for blocks with large outputs. With `split_dim=None` it starts at
    rest and the last point comes out. https://arxiv.org/abs/1709.03698.
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


@dataclass(frozen=True)
class Scaled(Alternating):
    """(a, b) -> (b, scale a + f); inverse a = (b' - f) / scale.

    With a small scale a pretrained residual network is nearly itself, for fine-tuning; each step
    multiplies the reconstruction's error by 1 / scale, so not for deep stacks with small scale.
    MEFT, https://arxiv.org/abs/2306.00477.
    """

    scale: float = 0.9

    def __post_init__(self) -> None:
        _nonzero("scale", self.scale)

    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.scale * a + f

    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return (out - f) / self.scale


@dataclass(frozen=True)
class BDIA(Coupling):
    """x+ = g (x- + s u) + Q((1 - g) x + (1 + g) f(x)), with g = gamma or -gamma, drawn for each sample and step.

    Streams are (x-, x), u = 2^-bits is the grid, Q rounds to it, and s = (x- / u) mod 2 makes the
    first term a multiple of u: these parities, one bit an element, are kept, and make the step exact:
    x- = (x+ - Q(...)) / g - s u. In evaluation g = 0: the plain residual network x + Q(f(x)), which
    keeps its activations if it is differentiated. For training residual architectures as they are,
    with `grid_bits` and best with `split_dim=None`. Not where one bit an element and block is too
    much. https://arxiv.org/abs/2407.09093.
    """

    gamma: float = 0.5
    bits: int | None = None
    needs_grid = True

    def __post_init__(self) -> None:
        if self.gamma != 0.5:
            raise ValueError(f"gamma={self.gamma!r}: bdia keeps one bit an element, which is enough for 0.5 only")

    def on_grid(self, bits: int) -> Coupling:
        return BDIA(self.gamma, bits)

    def limit(self, dtype: torch.dtype) -> float:
        assert self.bits is not None
        return grid_limit(dtype, self.bits) / 2

    def at(self, a: Tensor, b: Tensor, training: bool) -> Coupling:
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
        return self.at(a, b, True).forward(a, b, f)

    def recover(self, a_out: Tensor, b_out: Tensor) -> Tensor:
        raise ValueError("bdia has no inverse from its output alone: that takes the bits which its forward has kept")

    def inverse(self, a_out: Tensor, b_out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.recover(a_out, b_out)

    def finish(self, a: Tensor, b: Tensor) -> Tensor:
        return b


@dataclass(frozen=True)
class _BDIAStep(Alternating):
    gamma: Tensor  # (batch, 1, ...)
    odd: Tensor | None  # packed parities of x-
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


def additive_coupling_forward(other_stream: Tensor, fn_out: Tensor) -> Tensor:
    """The additive coupling in RevLib's signature, (other, f) -> out."""
    return other_stream + fn_out


def additive_coupling_inverse(output: Tensor, fn_out: Tensor) -> Tensor:
    """Undoes `additive_coupling_forward`: (out, f) -> other."""
    return output - fn_out


@dataclass(frozen=True)
class Pair(Alternating):
    """(a, b) -> (b, coupling_forward(a, f)); inverse a = coupling_inverse(b', f).

    A user's own pair of callables, in RevLib's signature.
    """

    coupling_forward: Callable[[Tensor, Tensor], Tensor] = additive_coupling_forward
    coupling_inverse: Callable[[Tensor, Tensor], Tensor] = additive_coupling_inverse

    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.coupling_forward(a, f)

    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.coupling_inverse(out, f)


@dataclass(frozen=True)
class Invertible(Coupling):
    """(a, b) -> (m(a), m(b)); inverse by m.inverse. A step without a block."""

    module: Any

    def forward(self, a: Tensor, b: Tensor, f: Tensor) -> Streams:
        return self.module(a), self.module(b)

    def recover(self, a_out: Tensor, b_out: Tensor) -> Tensor:
        return self.module.inverse(b_out)

    def inverse(self, a_out: Tensor, b_out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.module.inverse(a_out)


COUPLINGS: dict[str, type[Coupling]] = {
    "additive": Additive,
    "affine": Affine,
    "momentum": Momentum,
    "midpoint": Midpoint,
    "leapfrog": Leapfrog,
    "scaled": Scaled,
    "bdia": BDIA,
}

CouplingSpec: TypeAlias = str | Coupling | Mapping[str, Any]


def get_coupling(coupling: CouplingSpec, **options: Any) -> Coupling:
    """A coupling by name, `get_coupling("momentum", gamma=0.9)`, or by mapping, `{"name": "momentum", "gamma": 0.9}`.

    A `Coupling` is returned as it is. Raises ValueError for an unknown name or option.
    """
    if isinstance(coupling, Coupling):
        return coupling
    if isinstance(coupling, Mapping):
        options = {**coupling, **options}
        if "name" not in options:
            raise ValueError(f"coupling={dict(coupling)!r} has no name; write {{'name': 'momentum', 'gamma': 0.9}}")
        coupling = options.pop("name")
    if coupling not in COUPLINGS:
        near = difflib.get_close_matches(str(coupling), COUPLINGS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"coupling={coupling!r} is unknown; {hint}There is {', '.join(COUPLINGS)}, or your own Coupling"
        )
    cls = COUPLINGS[coupling]
    known = inspect.signature(cls).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"coupling {coupling!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return cls(**options)


def _nonzero(name: str, value: float) -> None:
    if value == 0:
        raise ValueError(f"{name}={value!r}: the step would have no inverse; take a number other than zero")


class _Round(torch.autograd.Function):
    """Rounds to multiples of 1 / scale; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        return (x * scale).round_().div_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def round_to_grid(x: Tensor, bits: int) -> Tensor:
    """x rounded to multiples of 2^-bits, with the gradient of the identity."""
    return _Round.apply(x, 2.0**bits)


def grid_limit(dtype: torch.dtype, bits: int) -> float:
    """Below it, all multiples of 2^-bits are numbers of `dtype`."""
    mantissa = {torch.float32: 24, torch.float64: 53}.get(dtype)
    if mantissa is None:
        raise ValueError(f"grid_bits={bits} needs streams of float32 or float64, not {dtype}; set stream_dtype")
    return 2.0 ** (mantissa - bits)


def _pack_bits(bits: Tensor) -> Tensor:
    """Eight booleans a byte."""
    flat = torch.nn.functional.pad(bits.flatten(), (0, -bits.numel() % 8)).view(-1, 8)
    return (flat * _weights(bits.device)).sum(1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, shape: torch.Size) -> Tensor:
    flat = packed.unsqueeze(1).bitwise_and(_weights(packed.device)).ne(0).flatten()
    return flat[: shape.numel()].view(shape)


def _weights(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
