"""Invertible steps: modules with an `inverse`, applied to both streams of a stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_revlib.nn.coupling.base import Coupling, Streams


@dataclass(frozen=True)
class Invertible(Coupling):
    """(a, b) -> (m(a), m(b)); inverse (m.inverse(a'), m.inverse(b')). A step without a block."""

    module: Any

    def forward(self, a: Tensor, b: Tensor, f: Tensor) -> Streams:
        out = self.module(a), self.module(b)
        if not all(isinstance(each, Tensor) for each in out):
            raise TypeError(
                f"{type(self.module).__name__} is an invertible step, which returns one stream for one, and its forward"
                f" returned {type(out[0]).__name__}; keep what else it computes, such as a log-determinant, as an"
                " attribute, or have a block return it besides its branch"
            )
        return out

    def recover(self, a_out: Tensor, b_out: Tensor) -> Tensor:
        return self.module.inverse(b_out)

    def inverse(self, a_out: Tensor, b_out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.module.inverse(a_out)


class SpaceToDepth(nn.Module):
    """(B, C, H, W) -> (B, C k^2, H/k, W/k): the pixels of each k x k patch become channels.

    >>> SpaceToDepth(2)(torch.randn(1, 3, 8, 8)).shape
    torch.Size([1, 12, 4, 4])

    Downsampling without loss, unlike pooling or strides. i-RevNet, https://arxiv.org/abs/1802.07088.
    Raises ValueError if k does not divide both height and width.
    """

    exact = True

    def __init__(self, block_size: int) -> None:
        super().__init__()
        if block_size < 1:
            raise ValueError(f"block_size={block_size}: the side of a patch in pixels is at least 1")
        self.block_size = block_size

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.block_size or x.shape[-2] % self.block_size:
            raise ValueError(f"SpaceToDepth({self.block_size}) does not divide an image of {list(x.shape[-2:])} pixels")
        return F.pixel_unshuffle(x, self.block_size)

    def inverse(self, y: Tensor) -> Tensor:
        return F.pixel_shuffle(y, self.block_size)

    def extra_repr(self) -> str:
        return str(self.block_size)


class Permutation(nn.Module):
    """A fixed random permutation of the `size` entries along `dim`, saved in the state dict.

    >>> Permutation(16)(torch.randn(2, 16)).shape
    torch.Size([2, 16])

    Mixes channels that a split would otherwise keep apart. Glow, https://arxiv.org/abs/1807.03039.
    """

    exact = True
    order: Tensor
    back: Tensor

    def __init__(self, size: int, dim: int = 1, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("order", torch.randperm(size, generator=generator))
        self.register_buffer("back", self.order.argsort())

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.order)

    def inverse(self, y: Tensor) -> Tensor:
        return y.index_select(self.dim, self.back)

    def extra_repr(self) -> str:
        return f"{len(self.order)}, dim={self.dim}"


class Reflections(nn.Module):
    """V -> the product of the reflections I - 2 v v^T / |v|^2, one for each column v of V's lower triangle.

    The columns' lengths do not matter, so that weight decay leaves the product as it is. With S, the upper triangle of
    V^T V whose diagonal is halved, the product is I - V S^-1 V^T (https://doi.org/10.1145/1141885.1141886).
    """

    signs: Tensor  # of the product's columns

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("signs", torch.ones(size))

    def forward(self, vectors: Tensor) -> Tensor:
        v = vectors.tril()
        products = v.mT @ v
        s = products.triu() - products.diagonal().diag() / 2
        return (torch.eye(len(v)).to(v) - v @ torch.linalg.solve_triangular(s, v.mT, upper=True)) * self.signs


class Orthogonal(nn.Module):
    """x -> W x along `dim` with a trained orthogonal W: a 1 x 1 convolution whose inverse is its transpose.

    >>> Orthogonal(16)(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 16, 8, 8])

    W is random at first, and stays as it is under weight decay. Not for exact stacks, since the product rounds. Glow,
    https://arxiv.org/abs/1807.03039.
    """

    def __init__(self, size: int, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.linear = nn.Linear(size, size, bias=False)
        nn.init.normal_(self.linear.weight)
        parametrize.register_parametrization(self.linear, "weight", Reflections(size))
        self.register_load_state_dict_pre_hook(_convert)

    def forward(self, x: Tensor) -> Tensor:
        return self._rotate(x, back=False)

    def inverse(self, y: Tensor) -> Tensor:
        return self._rotate(y, back=True)

    def _rotate(self, x: Tensor, back: bool) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # in 16 bits W would not be orthogonal
            weight: Tensor = self.linear.weight
            return F.linear(x.movedim(self.dim, -1), weight.mT if back else weight).movedim(-1, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _convert(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Convert a state dict of torch's orthogonal parametrization: ones stood for the diagonal, which had the signs."""
    vectors, signs = (f"{prefix}linear.parametrizations.weight.{name}" for name in ("original", "0.signs"))
    if vectors in state and signs not in state:
        former = state[vectors]
        state[vectors], state[signs] = former.tril(-1) + torch.eye(len(former)).to(former), former.diagonal().sign()
