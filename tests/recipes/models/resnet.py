"""Residual networks of https://arxiv.org/abs/1512.03385, table 1, option B with batch norm, to compare with."""

from __future__ import annotations

from torch import nn
from torch.nn import functional as F

BLOCKS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}


class Block(nn.Module):
    def __init__(self, seen, width, stride, wide):
        super().__init__()
        sizes = [(1, 1), (3, stride), (1, 1)] if wide else [(3, stride), (3, 1)]
        widths = [seen, width, width, 4 * width] if wide else [seen, width, width]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, k, stride=s, padding=k // 2, bias=False)
            for a, b, (k, s) in zip(widths, widths[1:], sizes, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in widths[1:])
        self.skip = None
        if stride != 1 or seen != widths[-1]:
            self.skip = nn.Sequential(
                nn.Conv2d(seen, widths[-1], 1, stride=stride, bias=False), nn.BatchNorm2d(widths[-1])
            )

    def branch(self, x):
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(F.relu(x) if i else x))
        return x

    def forward(self, x):
        return F.relu(self.branch(x) + (x if self.skip is None else self.skip(x)))


class ResNet(nn.Module):
    def __init__(self, depth, classes=10, width=64, imagenet=False):
        super().__init__()
        wide = depth >= 50
        kernel = 7 if imagenet else 3
        self.conv1 = nn.Conv2d(3, width, kernel, stride=1 + imagenet, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if imagenet else nn.Identity()
        seen = width
        for i, count in enumerate(BLOCKS[depth]):
            narrow = width * 2**i
            blocks = []
            for j in range(count):
                blocks.append(Block(seen, narrow, 2 if i and not j else 1, wide))
                seen = narrow * (4 if wide else 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(seen, classes)

    def forward(self, x):
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(x.mean((2, 3)))
