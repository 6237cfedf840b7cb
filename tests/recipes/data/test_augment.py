"""Augmentation: each image by random numbers of its own, within the given bounds."""

from __future__ import annotations

import pytest
import torch

from lightning_revlib.recipes.data.augment import center_crop, crop, flip, jitter, resized_crop

IMAGES = torch.rand(64, 3, 8, 8)


def test_crop_shifts_and_fills_with_zeros():
    numbered = torch.arange(1.0, 65).view(1, 1, 8, 8).expand(500, 2, 8, 8)
    shifted = crop(numbered, 2)
    assert shifted.shape == numbered.shape
    found = {tuple(((image[0] == 28).nonzero()[0] - torch.tensor([3, 3])).tolist()) for image in shifted}
    assert found == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    assert set(shifted.unique().tolist()) == set(range(65))
    assert torch.equal(shifted[:, 0], shifted[:, 1])  # all channels alike


def test_flip_turns_about_half():
    flipped = flip(IMAGES)
    same, turned = ((flipped == other).flatten(1).all(1) for other in (IMAGES, IMAGES.flip(-1)))
    assert (same ^ turned).all() and 10 < turned.sum() < 54


def test_resized_crop_stays_inside_and_varies():
    ramp = torch.linspace(0, 1, 32).expand(64, 1, 32, 32)
    parts = resized_crop(ramp, 16, 0.08)
    assert parts.shape == (64, 1, 16, 16)
    assert parts[..., 0].min() > 0 or parts[..., 1].min() > 0
    width = (parts[:, 0, 0, -1] - parts[:, 0, 0, 0]) * 16 / 15
    assert width.min() < 0.5 and width.max() > 0.8
    assert torch.allclose(resized_crop(IMAGES, 8, 1.0, ratio=1.0), IMAGES, atol=1e-5)


def test_center_crop():
    assert torch.equal(center_crop(IMAGES, 4), IMAGES[:, :, 2:6, 2:6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_shape_stay(dtype):
    for change in (lambda x: jitter(x, 0.1), lambda x: crop(x, 1), flip):
        out = change(IMAGES.to(dtype))
        assert out.dtype == dtype and out.shape == IMAGES.shape and not torch.equal(out, IMAGES.to(dtype))
