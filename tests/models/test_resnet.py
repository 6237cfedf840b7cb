"""A residual network as in https://arxiv.org/abs/1512.03385, its stages nn.Sequential as in well-known packages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_revlib as revlib
from tests.models.family import COUPLINGS, Family, check_gradients, check_memory, check_training


class Basic(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if (i, stride) == (o, 1) else nn.Sequential(
            nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o // 4, 1, bias=False), nn.BatchNorm2d(o // 4)
        self.conv2, self.bn2 = nn.Conv2d(o // 4, o // 4, 3, stride, 1, bias=False), nn.BatchNorm2d(o // 4)
        self.conv3, self.bn3 = nn.Conv2d(o // 4, o, 1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None if (i, stride) == (o, 1) else nn.Sequential(
            nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, depth: int, block: Any) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(*[block(8, 8, 1) for _ in range(2)])
        self.layer2 = nn.Sequential(block(8, 16, 2), *[block(16, 16, 1) for _ in range(depth)])
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def batch() -> Any:
    return {"x": torch.randn(6, 3, 8, 8), "y": torch.arange(6) % 3}


OPTIONS = {"residual": True, "split_dim": None, "ordinary": 1}
FAMILIES = {
    block.__name__: Family(
        lambda depth, block=block: ResNet(depth, block),  # type: ignore[misc]
        batch, lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]), "layer2", OPTIONS,
    )
    for block in (Basic, Bottleneck)
}  # fmt: skip


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients(name: str, coupling: str) -> None:
    check_gradients(FAMILIES[name], coupling)


@pytest.mark.parametrize("name", FAMILIES)
def test_memory(name: str) -> None:
    check_memory(FAMILIES[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_training(name: str, tmp_path: Any) -> None:
    check_training(FAMILIES[name], tmp_path)


def test_a_stage_that_changes_the_shape_is_explained() -> None:
    model = ResNet(2, Basic)
    revlib.swap(model, {"layer2": {"residual": True, "split_dim": None}})
    with pytest.raises(ValueError, match=r"layer2\.0 \(Basic\) returned shape \[6, 16, 4, 4\].*ordinary=1"):
        model(batch()["x"])
