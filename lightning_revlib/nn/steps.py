"""Invertible steps: modules with an `inverse`, applied to both streams of a stack."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SpaceToDepth(nn.Module):
    """psi: (B, C, H, W) -> (B, C k^2, H/k, W/k), each k x k patch of pixels into channels.

    >>> SpaceToDepth(2)(torch.randn(1, 3, 8, 8)).shape
    torch.Size([1, 12, 4, 4])

    Loses nothing, unlike pooling or strides. i-RevNet, https://arxiv.org/abs/1802.07088.
    Raises ValueError where k does not divide the height and the width.
    """

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
