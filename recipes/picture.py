"""The picture of `revlib predict`: images beside their reconstruction."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

PAIRS = 6  # a row


def draw(path: str | Path, images: Tensor, reconstruction: Tensor, predicted: Tensor, worst: float) -> Path:
    """Write a PNG of pairs, original left and reconstruction right, under the class predicted.

    Args:
        images: (N, C, H, W) in [0, 1], C 1 or 3; `reconstruction` likewise.
        predicted: (N,) classes.
        worst: the largest relative error, for the title.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and needed by one command
    from matplotlib.figure import Figure

    rows = -(-len(images) // PAIRS)
    figure = Figure(figsize=(2.1 * PAIRS, 1.35 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"original | reconstruction from the network's output (error at most {worst:.1e})")
    axes = list(figure.subplots(rows, PAIRS, squeeze=False).flat)
    for axis in axes:
        axis.axis("off")
    for axis, left, right, label in zip(axes, images, reconstruction, predicted, strict=False):
        gap = left.new_ones(left.shape[0], left.shape[1], 1)
        pair = torch.cat([left, gap, right], dim=2).clamp(0, 1).permute(1, 2, 0)  # (H, 2 W + 1, C)
        axis.imshow(pair.expand(-1, -1, 3).numpy(), interpolation="nearest")
        axis.set_title(f"predicted {int(label)}", fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
