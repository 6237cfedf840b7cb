from __future__ import annotations

import pytest
import torch

import lightning_revlib as revlib


def test_space_to_depth_moves_patches_into_channels_and_back() -> None:
    x = torch.arange(32.0).view(1, 2, 4, 4)
    psi = revlib.SpaceToDepth(2)
    assert psi(x).shape == (1, 8, 2, 2)
    assert psi(x)[0, :4, 0, 0].tolist() == [0, 1, 4, 5]
    assert torch.equal(psi.inverse(psi(x)), x)


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="block_size=0"):
        revlib.SpaceToDepth(0)
    with pytest.raises(ValueError, match=r"SpaceToDepth\(2\) does not divide an image of \[3, 4\] pixels"):
        revlib.SpaceToDepth(2)(torch.randn(1, 2, 3, 4))
