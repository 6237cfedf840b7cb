"""Augment a batch of images on its device, with random numbers of its own for each image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def jitter(images: Tensor, amount: float) -> Tensor:
    """Transform each of the images (B, C, H, W) by a random affine map near the identity.

    `amount` is the standard deviation of the map's entries, in units of half an image.
    """
    return _sample(images, torch.eye(2, 3) + amount * torch.randn(len(images), 2, 3), images.shape[-2:])


def crop(images: Tensor, padding: int) -> Tensor:
    """Shift each image by up to `padding` pixels in each direction, and fill with zeros."""
    height, width = images.shape[-2:]
    padded = F.pad(images, [padding] * 4)
    top, left = torch.randint(2 * padding + 1, (2, len(images), 1), device=images.device)
    rows = (top + torch.arange(height, device=images.device))[:, None, :, None]  # (B, 1, H, 1)
    columns = (left + torch.arange(width, device=images.device))[:, None, None, :]
    one = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[one, channels, rows, columns]


def flip(images: Tensor) -> Tensor:
    """Exchange left and right in a random half of the images."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(-1), images)


def resized_crop(images: Tensor, size: int, smallest: float, ratio: float = 4 / 3) -> Tensor:
    """Return a random rectangle of each image as size x size pixels.

    The rectangle has at least the share `smallest` of the image's area, and its sides differ at most by a factor
    `ratio`.

    Going deeper with convolutions, https://arxiv.org/abs/1409.4842.
    """
    area = smallest + (1 - smallest) * torch.rand(len(images))
    stretch = torch.exp((2 * torch.rand(len(images)) - 1) * torch.log(torch.tensor(ratio)))
    sides = torch.stack([area.mul(stretch).sqrt(), area.div(stretch).sqrt()], 1).clamp(max=1)  # width, height
    middle = (1 - sides) * (2 * torch.rand(len(images), 2) - 1)
    return _sample(images, torch.cat([torch.diag_embed(sides), middle[:, :, None]], 2), torch.Size((size, size)))


def center_crop(images: Tensor, size: int) -> Tensor:
    """Return the middle size x size pixels of each image."""
    top, left = ((n - size) // 2 for n in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def _sample(images: Tensor, maps: Tensor, size: torch.Size) -> Tensor:
    """Sample each image under its affine map (2, 3), to a size."""
    grid = F.affine_grid(maps.to(images), [*images.shape[:2], *size], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
