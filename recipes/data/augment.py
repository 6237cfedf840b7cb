"""Augmentation of a batch of images on its device, each image in a way of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def jitter(images: Tensor, amount: float) -> Tensor:
    """Each of the images (B, C, H, W) under an affine map of its own, near the identity.

    `amount` is the standard deviation of the map's entries, of which 1 is half an image.
    """
    return _sample(images, torch.eye(2, 3) + amount * torch.randn(len(images), 2, 3), images.shape[-2:])


def crop(images: Tensor, padding: int) -> Tensor:
    """The images shifted by up to `padding` pixels in each direction, with zeros where nothing was."""
    height, width = images.shape[-2:]
    padded = F.pad(images, [padding] * 4)
    top, left = torch.randint(2 * padding + 1, (2, len(images), 1), device=images.device)
    rows = (top + torch.arange(height, device=images.device))[:, None, :, None]  # (B, 1, H, 1)
    columns = (left + torch.arange(width, device=images.device))[:, None, None, :]
    one = torch.arange(len(images), device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return padded[one, channels, rows, columns]


def flip(images: Tensor) -> Tensor:
    """Every second image, at random, with left and right exchanged."""
    chosen = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(chosen, images.flip(-1), images)


def resized_crop(images: Tensor, size: int, smallest: float, ratio: float = 4 / 3) -> Tensor:
    """A rectangle of each image, of `smallest` of its area or more and sides of at most `ratio`, as size x size pixels.

    Going deeper with convolutions, https://arxiv.org/abs/1409.4842.
    """
    area = smallest + (1 - smallest) * torch.rand(len(images))
    stretch = torch.exp((2 * torch.rand(len(images)) - 1) * torch.log(torch.tensor(ratio)))
    sides = torch.stack([area.mul(stretch).sqrt(), area.div(stretch).sqrt()], 1).clamp(max=1)  # width, height
    middle = (1 - sides) * (2 * torch.rand(len(images), 2) - 1)
    return _sample(images, torch.cat([torch.diag_embed(sides), middle[:, :, None]], 2), torch.Size((size, size)))


def center_crop(images: Tensor, size: int) -> Tensor:
    """The middle size x size pixels."""
    top, left = ((n - size) // 2 for n in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def _sample(images: Tensor, maps: Tensor, size: torch.Size) -> Tensor:
    grid = F.affine_grid(maps.to(images), [*images.shape[:2], *size], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
