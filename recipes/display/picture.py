"""Draw the pictures of `revlib predict`: images, each under its title."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def draw(path: str | Path, images: Tensor, titles: Sequence[str], *, heading: str, columns: int = 6) -> Path:
    """Write a PNG of images (N, C, H, W), C 1 or 3, in [0, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here since it is slow
    from matplotlib.figure import Figure

    rows, ratio = -(-len(images) // columns), images.shape[3] / images.shape[2]
    figure = Figure(figsize=(1.05 * ratio * columns, 1.35 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(heading)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, image, title in zip(axes, images, titles, strict=False):
        axis.imshow(image.clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def to_unit(images: Tensor, like: Tensor | None = None) -> Tensor:
    """Scale normalised images to [0, 1] by the least and the largest number of `like`, by default of the images."""
    low, high = torch.aminmax(images if like is None else like)
    return (images - low) / (high - low).clamp_min(1e-12)


def pairs(left: Tensor, right: Tensor) -> Tensor:
    """Join images side by side, with a white line between."""
    return torch.cat([left, left.new_ones(*left.shape[:3], 1), right], dim=3)
