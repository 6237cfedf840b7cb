"""The pictures of predictions."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.image import imread

from lightning_revlib.recipes.display.picture import draw


def red(path: Path) -> int:
    """Return the number of red pixels."""
    pixels = imread(path)[..., :3]
    return int(((pixels[..., 0] > 0.6) & (pixels[..., 1:] < 0.3).all(-1)).sum())


def test_an_error_is_marked_and_the_ground_is_white(tmp_path: Path) -> None:
    images = torch.zeros(3, 1, 8, 8)
    right = draw(tmp_path / "right.png", images, [1, 2, 3], [1, 2, 3], heading="all right")
    wrong = draw(tmp_path / "wrong.png", images, [1, 2, 3], [1, 7, 3], heading="one wrong", notes=["(9%)"] * 3)
    assert red(right) == 0 and red(wrong) > 100
    assert (imread(wrong)[0, 0] == 1).all()  # opaque, so that it is legible on any page
