"""Stacks of six kinds of blocks that the benchmark runs, by depth, width and batch.

A size's depth is the number of blocks and its width is that of one stream. Each list of sizes is a default of the
command, which `depths=` and `widths=` replace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_revlib.nn import CoupledSequential


class Size(NamedTuple):
    """The number of blocks, the width of one stream, and the batch."""

    depth: int
    width: int
    batch: int


def heads(width: int) -> int:
    """Return the number of attention heads; ValueError for a width that is no multiple of it."""
    if width % (count := max(4, width // 64)):
        raise ValueError(f"widths={width}: {count} heads need a multiple of {count}")
    return count


class Attention(nn.Module):
    """Self-attention with projections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = heads(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, width)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(-2, -3).flatten(-2))


def mlp(width: int) -> nn.Module:
    """Build two linear layers with a hidden layer of four times the width."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def conv(width: int) -> nn.Module:
    """Build two pre-activation convolutions."""
    layers = [(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False)) for _ in range(2)]
    return nn.Sequential(*layers[0], *layers[1])


def attention(width: int) -> nn.Module:
    """Build pre-norm self-attention."""
    return nn.Sequential(nn.LayerNorm(width), Attention(width))


def feed_forward(width: int) -> nn.Module:
    """Build a pre-norm feed-forward layer."""
    return nn.Sequential(nn.LayerNorm(width), mlp(width))


def repeated(*makers: Callable[[int], nn.Module]) -> Callable[[Size], list[nn.Module]]:
    """Return a function that builds a stack's blocks by `makers` in turn."""
    return lambda size: [make(size.width) for make in islice(cycle(makers), size.depth)]


def irevnet(size: Size) -> list[nn.Module]:
    """Build two stages of i-RevNet, the second with stride 2; one stage if the depth is no multiple of 4."""
    from lightning_revlib.recipes.models.irevnet import IRevNet

    if size.width < 4:
        raise ValueError(
            f"widths={size.width}: i-RevNet's inner convolutions have a quarter of the width; pass 4 or more"
        )
    channels, strides = ([size.width, 4 * size.width], [1, 2]) if size.depth % 4 == 0 else ([size.width], [1])
    net = IRevNet(
        (3, 32, 32), depth=size.depth // len(strides), channels=channels, strides=strides, initial_psi=2, dropout=0.0
    )
    return list(net.stack)


def momentum(width: int) -> nn.Module:
    """Build a block of Momentum ResNet."""
    from lightning_revlib.recipes.models.momentumnet import basic

    return basic(width, width, width)


def lsh(width: int) -> nn.Module:
    """Build a Reformer's LSH attention."""
    from lightning_revlib.recipes.models.attention import LSHAttention
    from lightning_revlib.recipes.models.reformer import AttentionBlock

    attend = LSHAttention(width, heads(width), hashes=2, chunk=64)
    return AttentionBlock(width, attend, shift=False, dropout=0.0)


@dataclass(frozen=True)
class Workload:
    """A kind of stack, with its inputs and sizes.

    `sample` is the input's shape without the batch, where the width of all streams replaces the entry of dimension
    `dim`. `units` is the number of `unit` in one sample. `draws` says that blocks draw random numbers.
    """

    name: str
    blocks: Callable[[Size], list[nn.Module]]
    unit: str
    units: int
    sample: tuple[int, ...]
    dim: int
    quick: Sequence[Size]
    full: Sequence[Size]
    cuda: Sequence[Size] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    draws: bool = False

    def stack(self, size: Size) -> CoupledSequential:
        """Build the stack of a size."""
        return CoupledSequential(*self.blocks(size), **{"split_dim": self.dim, **self.options})

    def input(self, size: Size, **factory: Any) -> Tensor:
        """Draw an input of a size; `factory` are arguments of `torch.randn`."""
        streams = 1 if self.options.get("split_dim", self.dim) is None else 2
        shape = [size.batch, *self.sample]
        shape[self.dim] = streams * size.width
        return torch.randn(shape, **factory)


def _sizes(*sizes: tuple[int, int, int]) -> list[Size]:
    return [Size(*size) for size in sizes]


IMAGES: dict[str, Any] = {"unit": "images", "units": 1, "sample": (0, 16, 16), "dim": 1}
WORKLOADS = {
    each.name: each
    for each in (
        Workload(
            "mlp",
            repeated(mlp),
            "rows",
            1,
            (0,),
            1,
            quick=_sizes((4, 256, 256), (16, 64, 256), (32, 32, 64)),
            full=_sizes((4, 64, 4096), (4, 512, 512), (16, 128, 1024), (64, 64, 512), (64, 128, 256), (256, 32, 256)),
            cuda=_sizes((16, 1024, 8192), (16, 4096, 8192), (64, 1024, 8192)),
        ),
        Workload(
            "conv",
            repeated(conv),
            quick=_sizes((4, 64, 4), (16, 16, 4)),
            full=_sizes((4, 32, 32), (4, 128, 8), (16, 32, 16), (64, 16, 8), (64, 32, 4), (256, 16, 2)),
            cuda=_sizes((16, 256, 256), (64, 128, 256)),
            **IMAGES,
        ),
        Workload(
            "transformer",
            repeated(attention, feed_forward),
            "tokens",
            128,
            (128, 0),
            2,
            quick=_sizes((4, 256, 2), (16, 64, 2)),
            full=_sizes((4, 64, 32), (4, 512, 4), (16, 128, 8), (64, 64, 4), (64, 128, 2), (256, 32, 2)),
            cuda=_sizes((16, 1024, 256), (16, 2048, 128), (16, 4096, 64), (64, 1024, 64)),
        ),
        Workload(
            "irevnet",
            irevnet,
            quick=_sizes((4, 64, 8), (8, 32, 4)),
            full=_sizes((4, 32, 64), (4, 128, 16), (16, 64, 16), (64, 32, 8), (256, 16, 4)),
            cuda=_sizes((16, 128, 256), (64, 128, 256)),
            **IMAGES,
        ),
        Workload(
            "momentumnet",
            repeated(momentum),
            quick=_sizes((4, 64, 4), (8, 16, 4)),
            full=_sizes((4, 32, 32), (4, 128, 8), (16, 32, 16), (64, 16, 8), (256, 16, 2)),
            cuda=_sizes((16, 256, 256), (64, 128, 256)),
            # The paper's 0.9 would lose 12 digits in 256 blocks.
            options={"split_dim": None, "coupling": {"name": "momentum", "gamma": 0.99}},
            **IMAGES,
        ),
        Workload(
            "reformer",
            repeated(lsh, feed_forward),
            "tokens",
            512,
            (512, 0),
            2,
            quick=_sizes((4, 128, 1), (4, 64, 1)),
            full=_sizes((4, 64, 4), (4, 256, 1), (16, 64, 2), (64, 32, 1)),
            cuda=_sizes((12, 512, 32), (12, 1024, 32)),
            draws=True,
        ),
    )
}
