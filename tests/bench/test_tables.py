"""The picture of a benchmark."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.image import imread

from lightning_revlib.bench.cell import Row
from lightning_revlib.bench.contestants import CONTESTANTS
from lightning_revlib.bench.tables import draw


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_legend_is_inside_of_the_picture(count, tmp_path):
    rows = [
        Row(f"workload {i}", 4, 8, 2, c.name, "", "cpu", "float32", peak=2**20 + k, over_plain=1.0 + k)
        for i in range(count)
        for k, c in enumerate(CONTESTANTS)
    ]
    draw(tmp_path / "bench.png", rows)
    pixels = imread(tmp_path / "bench.png")[..., :3]
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert np.all(edge == 1.0)  # white: nothing is cut off
