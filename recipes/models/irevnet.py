"""i-RevNet: an image classifier that is invertible up to its head.

    z = stack(pad(psi(x))),  x = psi^-1(unpad(stack^-1(z))),  logits = linear(pool(relu(bn(z))))

i-RevNet: Deep Invertible Networks, https://arxiv.org/abs/1802.07088. A fifth of this file are errors about sizes that
do not fit together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_revlib.nn import CoupledSequential, SpaceToDepth, get_coupling
from lightning_revlib.recipes.display.panel import Row
from lightning_revlib.recipes.display.picture import draw, pairs, to_unit
from lightning_revlib.recipes.tasks.base import OptimizerFactory, SchedulerFactory
from lightning_revlib.recipes.tasks.classifier import ImageClassifier, blocks_in_stages, check_images, image_dim


class Bottleneck(nn.Module):
    """F: three 3x3 convolutions with a narrow middle, and BN-ReLU before each of them but the network's first.

    With stride 2, psi has already been applied to the stream. The block undoes psi on its input and convolves with the
    stride instead.
    """

    def __init__(
        self, width: int, out: int, *, narrow: int, stride: int = 1, dropout: float = 0.0, first: bool = False
    ) -> None:
        super().__init__()
        seen = width // stride**2
        self.stride = stride
        self.body = nn.Sequential(
            *([] if first else [nn.BatchNorm2d(seen), nn.ReLU()]),
            nn.Conv2d(seen, narrow, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(),
            nn.Conv2d(narrow, narrow, 3, padding=1, bias=False),
            nn.Dropout(dropout),
            nn.BatchNorm2d(narrow),
            nn.ReLU(),
            nn.Conv2d(narrow, out, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, width, H, W) -> (B, out, H, W)
        return self.body(F.pixel_shuffle(x, self.stride) if self.stride > 1 else x)


class SplitPad(nn.Module):
    """Zero channels that widen the image to the first stage's width, in equal parts for both streams.

    The paper's program puts all zeros into the second stream. The first stream then carries the whole image, and
    trained networks invert badly in float32. `streams` is 1 if the streams do not divide the channels.
    """

    def __init__(self, channels: int, width: int, streams: int) -> None:
        super().__init__()
        self.channels = [channels // streams + (i < channels % streams) for i in range(streams)]  # 3 -> 2, 1
        self.width = width

    def forward(self, x: Tensor) -> Tensor:  # (B, channels, H, W) -> (B, streams * width, H, W)
        parts = x.split(self.channels, dim=1)
        return torch.cat([F.pad(p, (0, 0, 0, 0, 0, self.width - p.shape[1])) for p in parts], dim=1)

    def inverse(self, y: Tensor) -> Tensor:
        """Remove the zero channels."""
        parts = y.split(self.width, dim=1)
        return torch.cat([p[:, :n] for p, n in zip(parts, self.channels, strict=True)], dim=1)


class IRevNet(nn.Module):
    """The network, by default the paper's for CIFAR with 6.27 M parameters.

    >>> net = IRevNet().eval()
    >>> x = torch.randn(2, 3, 32, 32)
    >>> logits, z = net(x, bijective=True)
    >>> (net.inverse(z) - x).norm() / x.norm()    # about 1e-6

    Args:
        shape: the images' channels, height and width.
        classes: number of classes.
        depth: blocks in each stage, as a list, or one number for all stages.
        channels: of one stream after each stage; a stride of 2 needs four times those of the stage before.
        strides: of each stage, 1 or 2.
        initial_psi: side of the patches that become channels before the first stage; 0 for none.
        dropout: probability in each block.
        bottleneck: ratio of a stream's width to that of its blocks' inner convolutions.
        split_dim: 1, the channels, as in the paper; or 2 or 3, so that the streams are the image's halves in height or
            width, each with all channels.
        coupling: of the two streams: a name, or a mapping such as {"name": "momentum", "gamma": 0.9}.
        grid_bits: make the stack exact, see `CoupledSequential`: 12 keeps 4 digits, and inverts bit for bit.

    Raises:
        ValueError: for sizes that do not fit together.
    """

    def __init__(
        self,
        shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        *,
        depth: int | Sequence[int] = 18,
        channels: Sequence[int] = (16, 64, 256),
        strides: Sequence[int] = (1, 2, 2),
        initial_psi: int = 0,
        dropout: float = 0.1,
        bottleneck: int = 4,
        split_dim: int | None = 1,
        coupling: str | Mapping[str, Any] = "additive",
        grid_bits: int | None = None,
    ) -> None:
        super().__init__()
        blocks = blocks_in_stages(depth, len(strides))
        _check_stages(blocks, channels, strides, bottleneck)
        if split_dim is None:
            raise ValueError(
                "split_dim=None: one output does not determine two streams, and i-RevNet needs an inverse; take 1"
                " (channels), 2 (height) or 3 (width)"
            )
        dim = image_dim(split_dim)
        _check_size(shape, initial_psi, strides, dim)
        streams = 2 if dim == 1 else 1  # number of streams along the channels
        seen, width = shape[0] * max(1, initial_psi) ** 2, channels[0] // strides[0] ** 2
        if seen > streams * width:
            raise ValueError(
                f"channels={list(channels)}: with split_dim={split_dim} the network starts with {streams * width}"
                f" channels, the image has {seen} (shape={list(shape)}, initial_psi={initial_psi}), and none may be"
                f" lost; set channels[0] to {math.ceil(seen / streams) * strides[0] ** 2} or more"
            )
        self.shape, self.classes = tuple(shape), classes
        self.psi = SpaceToDepth(max(1, initial_psi))
        self.pad = SplitPad(seen, width, streams)
        steps: list[nn.Module] = []
        for count, out, stride in zip(blocks, channels, strides, strict=True):
            branch = get_coupling(coupling).branch_shape(torch.Size((1, out, 1, 1)))[1]
            for now in [stride] + [1] * (count - 1):
                first = not steps
                steps += [SpaceToDepth(now)] if now > 1 else []
                steps.append(
                    Bottleneck(out, branch, stride=now, narrow=out // bottleneck, dropout=dropout, first=first)
                )
        self.stack = CoupledSequential(*steps, split_dim=dim, coupling=coupling, grid_bits=grid_bits)
        self.head = nn.Sequential(
            nn.BatchNorm2d(streams * channels[-1]),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(streams * channels[-1], classes),
        )

    def forward(self, x: Tensor, *, bijective: bool = False) -> Any:
        """Return logits (B, classes) of images (B, *shape); with `bijective` also z, the input of `inverse`."""
        z = self.stack(self.pad(self.psi(x)))
        return (self.head(z), z) if bijective else self.head(z)

    def inverse(self, z: Tensor) -> Tensor:
        """Return the images from the stack's output z, up to rounding, in eval mode."""
        return self.psi.inverse(self.pad.inverse(self.stack.inverse(z)))


class IRevNetModule(ImageClassifier):
    """Train an i-RevNet; takes `IRevNet`'s arguments, and `optimizer` and `scheduler` as `ImageClassifier` does.

    >>> trainer = lightning.Trainer(strategy="reversible")
    >>> trainer.fit(IRevNetModule(shape=(1, 8, 8), depth=3), Digits())

    Arguments are saved with the checkpoint and have to be plain Python: numbers, lists, dictionaries.
    """

    def __init__(
        self, optimizer: OptimizerFactory | None = None, scheduler: SchedulerFactory | None = None, **net: Any
    ) -> None:
        check_images(net)
        network = IRevNet(**net)
        super().__init__(
            network, classes=network.classes, shape=network.shape, optimizer=optimizer, scheduler=scheduler
        )
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the class of each image and the relative error of its reconstruction by `inverse`.

        The first batch has the images, their reconstructions and, if there are any, their labels as well.
        """
        images = batch[0]
        logits, z = self.net(images, bijective=True)
        reconstruction = self.net.inverse(z)
        error = (reconstruction - images).flatten(1).norm(dim=1) / images.flatten(1).norm(dim=1).clamp_min(1e-12)
        first = {} if batch_idx else {"images": images.cpu(), "reconstruction": reconstruction.cpu()}
        labels = {"label": batch[1].cpu()} if len(batch) > 1 and not batch_idx else {}
        return {"error": error, "predicted": logits.argmax(1), **first, **labels}

    def present(self, batches: list[dict[str, Tensor]], cfg: Any) -> list[Row]:
        """Draw images beside their reconstructions from the network's output, and return the rows to print."""
        error, first = torch.cat([batch["error"] for batch in batches]), batches[0]
        left, right = (first[k][: cfg.images].float() for k in ("images", "reconstruction"))
        path = draw(
            cfg.picture,
            pairs(to_unit(left), to_unit(right, like=left)),
            first["predicted"].tolist(),
            first["label"].tolist() if "label" in first else None,
            heading=(
                "class predicted, true class: original | reconstruction from the network's output\n"
                f"(relative error at most {error.max():.1e})"
            ),
        )
        return [
            ("reconstruction", f"off by {error.max():.1e} at most, relative, over {len(error)} images"),
            ("picture", os.path.relpath(path)),
        ]


def _check_stages(blocks: list[int], channels: Sequence[int], strides: Sequence[int], bottleneck: int) -> None:
    """Raise ValueError for stages whose sizes do not fit together."""
    if len(blocks) != len(strides) or len(channels) != len(strides):
        raise ValueError(
            f"depth={blocks}, channels={list(channels)} and strides={list(strides)} must have equally many stages;"
            " one number for depth serves all stages"
        )
    if any(stride not in (1, 2) for stride in strides):
        raise ValueError(f"strides={list(strides)}: a stage's stride is 1 or 2")
    for before, after, stride in zip(channels, channels[1:], strides[1:], strict=False):
        if after != before * stride**2:
            raise ValueError(
                f"channels={list(channels)}, strides={list(strides)}: {before} channels become"
                f" {before * stride**2} at a stride of {stride}, not {after}, since no number may be lost or made"
            )
    if channels[0] % strides[0] ** 2 or channels[0] < bottleneck:
        raise ValueError(
            f"channels[0]={channels[0]} must be a multiple of {strides[0] ** 2} and at least bottleneck={bottleneck}"
        )


def _check_size(shape: Sequence[int], initial_psi: int, strides: Sequence[int], dim: int) -> None:
    """Raise ValueError for images that the stages cannot divide."""
    if len(shape) != 3 or initial_psi < 0:
        raise ValueError(
            f"shape={list(shape)}, initial_psi={initial_psi}: give (channels, height, width), and 0 or more"
        )
    shrink = max(1, initial_psi) * 2 ** list(strides).count(2)
    for axis, size in ((2, shape[1]), (3, shape[2])):
        if size % (unit := shrink * (2 if axis == dim else 1)):
            halved = f", and is halved along split_dim={dim}" if axis == dim else ""
            raise ValueError(
                f"an image of {shape[1]} x {shape[2]} pixels shrinks {shrink} times (initial_psi={initial_psi},"
                f" strides={list(strides)}){halved}: {size} is not a multiple of {unit};"
                " pad the images, or take smaller strides, initial_psi or another split_dim"
            )
