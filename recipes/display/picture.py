"""Draw the pictures of `revlib predict`: images, each under its title."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RED = "#b00020"


def draw(
    path: str | Path,
    images: Tensor,
    predicted: Sequence[int],
    true: Sequence[int] | None = None,
    *,
    heading: str,
    notes: Sequence[str] = (),
    columns: int = 6,
) -> Path:
    """Write a PNG of images (N, C, H, W), C 1 or 3, in [0, 1], on white, which is legible beside light and dark text.

    The title of an image is the class predicted, a note such as its probability, and the true class. If they differ,
    a cross and a red frame mark the error.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here since it is slow
    from matplotlib.figure import Figure

    rows, ratio = -(-len(images) // columns), images.shape[3] / images.shape[2]
    figure = Figure(figsize=(max(1.05 * ratio, 1.25) * columns, 1.6 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(heading)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(images) :]:
        axis.axis("off")
    for i, (axis, image) in enumerate(zip(axes, images, strict=False)):
        axis.imshow(image.clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
        wrong = true is not None and true[i] != predicted[i]
        lines = [" ".join([str(predicted[i]), *notes[i : i + 1], *(["\u2717"] if wrong else [])])]
        lines += [] if true is None else [f"true {true[i]}"]
        axis.set_title("\n".join(lines), fontsize=9, color=RED if wrong else "black")
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set(visible=wrong, color=RED, linewidth=2)
    return save(figure, path)


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure of matplotlib on white. ValueError for a suffix that is not a picture's."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=120, facecolor="white")
    except ValueError as error:
        raise ValueError(f"picture={path}: {error}") from error
    return path


def to_unit(images: Tensor, like: Tensor | None = None) -> Tensor:
    """Scale normalised images to [0, 1] by the least and the largest number of `like`, by default of the images."""
    low, high = torch.aminmax(images if like is None else like)
    return (images - low) / (high - low).clamp_min(1e-12)


def pairs(left: Tensor, right: Tensor) -> Tensor:
    """Join images side by side, with a white line between."""
    return torch.cat([left, left.new_ones(*left.shape[:3], 1), right], dim=3)
