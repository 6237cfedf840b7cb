"""Momentum ResNet: residual networks whose blocks add to a velocity, which makes each stage invertible.

    x = first(x);  v = 0, or velocity(x);  v <- gamma v + (1 - gamma) f(x), x <- x + v  for the stage's other blocks f

Momentum Residual Neural Networks, https://arxiv.org/abs/2102.07870, are made of the residual networks of
https://arxiv.org/abs/1512.03385. The first block of a stage changes the size and stays an ordinary residual block. The
other blocks lose their skip connection and last ReLU, or keep both if a trained network is converted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_revlib.nn import CoupledSequential, Momentum, get_coupling
from lightning_revlib.recipes.tasks.base import OptimizerFactory, SchedulerFactory
from lightning_revlib.recipes.tasks.classifier import ImageClassifier, blocks_in_stages, check_images, image_dim

DEPTHS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
CouplingOptions: TypeAlias = str | Mapping[str, Any]


def basic(seen: int, width: int, out: int, stride: int = 1) -> nn.Sequential:
    """Build two 3x3 convolutions, the blocks of networks of depth 18 and 34."""
    return nn.Sequential(*_conv(seen, width, 3, stride), nn.ReLU(inplace=True), *_conv(width, out, 3))


def bottleneck(seen: int, width: int, out: int, stride: int = 1) -> nn.Sequential:
    """Build three convolutions with a narrow middle, the blocks of deeper networks."""
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(*_conv(seen, width, 1), relu, *_conv(width, width, 3, stride), relu, *_conv(width, out, 1))


class Residual(nn.Module):
    """The ordinary residual block, relu(body(x) + skip(x)), that opens each stage."""

    def __init__(self, body: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.body, self.skip = body, skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class Stage(nn.Module):
    """A block that may change the size, and a stack of blocks that do not.

    Args:
        first: the block that opens the stage.
        *others: the blocks of the stack; there may be none.
        velocity: a module that computes v0 from the stage's x; None for zero. For the momentum coupling on one stream.
        coupling, **options: of the stack, as in `CoupledSequential`.
    """

    def __init__(
        self,
        first: nn.Module,
        *others: nn.Module,
        velocity: nn.Module | None = None,
        coupling: CouplingOptions = "momentum",
        **options: Any,
    ) -> None:
        super().__init__()
        self.first, self.velocity = first, velocity
        resolved = get_coupling(coupling)
        if velocity is not None:
            if not isinstance(resolved, Momentum) or options.get("split_dim") is not None:
                raise ValueError(
                    f"velocity={type(velocity).__name__}, coupling={coupling!r}, split_dim={options.get('split_dim')}:"
                    " only coupling=momentum with split_dim=null starts from a velocity"
                )
            resolved = replace(resolved, init=velocity)
        self.stack = CoupledSequential(*others, coupling=resolved, **options) if others else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(self.first(x))


class MomentumNet(nn.Module):
    """The network, by default Momentum ResNet-18 for CIFAR-10 with 11.2 M parameters.

    >>> net = MomentumNet(depth=101)
    >>> net(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 10])

    Args:
        shape: the images' channels, height and width.
        classes: number of classes.
        depth: 18, 34, 50, 101 or 152, the published networks; or the number of blocks in each stage, as a list, or as
            one number below 18 for all stages.
        width: number of channels of the first stage's narrow convolutions; each further stage has twice as many.
        strides: of each stage.
        stem: "cifar", a 3x3 convolution; or "imagenet", 7x7 with stride 2, then max-pooling.
        wide: blocks have three convolutions, with four times the width outside; None: from depth 50 on.
        velocity: how v0 is computed from a stage's input: None for zero, "learned" for a 1x1 convolution, or a function
            from the number of channels to a module.
        split_dim: None, as in the paper, for streams of the stage's full width. 1 for streams that are halves of its
            channels, which makes a RevNet if the coupling is additive; 2 or 3 for halves of height or width.
        coupling: of the two streams: a name, or a mapping such as {"name": "momentum", "gamma": 0.9}.
        grid_bits: make the stacks exact, see `CoupledSequential`; not for momentum.

    Raises:
        ValueError: for sizes or options that do not fit together.
    """

    def __init__(
        self,
        shape: Sequence[int] = (3, 32, 32),
        classes: int = 10,
        *,
        depth: int | Sequence[int] = 18,
        width: int = 64,
        strides: Sequence[int] = (1, 2, 2, 2),
        stem: Literal["cifar", "imagenet"] = "cifar",
        wide: bool | None = None,
        velocity: Literal["learned"] | Callable[[int], nn.Module] | None = None,
        split_dim: int | None = None,
        coupling: CouplingOptions = "momentum",
        grid_bits: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(width, int) or width < 1:
            raise ValueError(f"width={width!r}: pass the number of channels of the first stage, 1 or more")
        blocks = _blocks(depth, strides)
        wide = isinstance(depth, int) and depth >= 50 if wide is None else wide
        dim = None if split_dim is None else image_dim(split_dim)
        make, expansion = (bottleneck, 4) if wide else (basic, 1)
        self.shape, self.classes = tuple(shape), classes
        self.stem = nn.Sequential(*_stem(shape[0], width, stem))
        seen, size = width, [side if stem == "cifar" else -(-side // 4) for side in shape[1:]]
        stages = []
        for index, (count, stride) in enumerate(zip(blocks, strides, strict=True)):
            narrow = width * 2**index
            out, size = narrow * expansion, [-(-side // stride) for side in size]
            stream = _stream_shape(index, (out, *size), split_dim)
            branch = get_coupling(coupling).branch_shape(stream)[1]
            same = stride == 1 and seen == out
            first = Residual(
                make(seen, narrow, out, stride), nn.Identity() if same else nn.Sequential(*_conv(seen, out, 1, stride))
            )
            others = [make(stream[1], narrow if dim != 1 else narrow // 2, branch) for _ in range(count - 1)]
            init = _velocity(velocity, out) if others else None
            stages.append(Stage(first, *others, velocity=init, coupling=coupling, split_dim=dim, grid_bits=grid_bits))
            seen = out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(seen, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # (B, *shape) -> (B, classes)
        return self.head(self.stages(self.stem(x)))


class MomentumNetModule(ImageClassifier):
    """Train a Momentum ResNet; takes `MomentumNet`'s arguments, and `optimizer` and `scheduler` of `ImageClassifier`.

    >>> trainer = lightning.Trainer(strategy="reversible")
    >>> trainer.fit(MomentumNetModule(shape=(1, 8, 8), depth=3, width=16, strides=(1, 2)), Digits())

    Arguments are saved with the checkpoint and have to be plain Python: numbers, lists, dictionaries.
    """

    def __init__(
        self, optimizer: OptimizerFactory | None = None, scheduler: SchedulerFactory | None = None, **net: Any
    ) -> None:
        check_images(net)
        network = MomentumNet(**net)
        super().__init__(
            network, classes=network.classes, shape=network.shape, optimizer=optimizer, scheduler=scheduler
        )
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])


def convert(
    resnet: nn.Module,
    *,
    coupling: CouplingOptions = "momentum",
    stages: Sequence[str] = ("layer1", "layer2", "layer3", "layer4"),
) -> nn.Module:
    """Make a residual network a Momentum ResNet with the same parameters, in place.

    >>> net = convert(torchvision.models.resnet101(weights="DEFAULT"), coupling={"name": "momentum", "gamma": 0.9})
    >>> Trainer(strategy="reversible").fit(ImageClassifier(net, classes=1000), data)

    Blocks are kept whole. If g is a block's function, with its skip connection and last ReLU, g(x) - x is added to the
    velocity. With a smaller gamma the new network is nearer to the old one and inverts worse, so train it further.
    Parameters stay the same objects in the same order, under new names: `layer1.0` becomes `layer1.first`, `layer1.1`
    becomes `layer1.stack.0`. Load weights before.

    Raises:
        ValueError: for a stage that the network does not have.
        TypeError: for a stage that is not an nn.Sequential of blocks.
    """
    for name in stages:
        layer = getattr(resnet, name, None)
        if layer is None:
            raise ValueError(f"stages={list(stages)}: {type(resnet).__name__} has no {name}; name its stages")
        if type(layer) is not nn.Sequential:
            raise TypeError(
                f"stage {name} of {type(resnet).__name__} is a {type(layer).__name__}, not an nn.Sequential"
            )
    for name in stages:
        setattr(resnet, name, Stage(*getattr(resnet, name), coupling=coupling, split_dim=None, residual=True))
    return resnet


def _stream_shape(stage: int, image: tuple[int, ...], split_dim: int | None) -> torch.Size:
    """Return the shape of a stage's stream for images (C, H, W); with a `split_dim` of None they are not halved."""
    shape = [1, *image]
    if split_dim is not None:
        dim = image_dim(split_dim)
        if shape[dim] % 2:
            raise ValueError(
                f"split_dim={split_dim}: the images of stage {stage} are {image[0]} x {image[1]} x {image[2]}, and"
                f" {shape[dim]} cannot be halved; take another split_dim, or null"
            )
        shape[dim] //= 2
    return torch.Size(shape)


def _conv(seen: int, out: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    """Build a convolution without bias, and its batch norm."""
    return nn.Conv2d(seen, out, kernel, stride=stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(out)


def _stem(channels: int, width: int, stem: str) -> list[nn.Module]:
    """Build the layers before the first stage."""
    if stem == "cifar":
        return [*_conv(channels, width, 3), nn.ReLU(inplace=True)]
    if stem == "imagenet":
        return [*_conv(channels, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
    raise ValueError(f"stem={stem!r} is none of 'cifar', 'imagenet'")


def _blocks(depth: int | Sequence[int], strides: Sequence[int]) -> list[int]:
    """Return the number of blocks in each stage; ValueError for depths that are not possible."""
    if isinstance(depth, int) and depth in DEPTHS:
        blocks = DEPTHS[depth]
    elif isinstance(depth, int) and depth >= min(DEPTHS):
        raise ValueError(
            f"depth={depth}: the networks of the paper are {', '.join(map(str, DEPTHS))}; for another, give the blocks"
            f" in each stage as a list, such as depth={[depth] * len(strides)}"
        )
    else:
        blocks = blocks_in_stages(depth, len(strides))
    if len(blocks) != len(strides):
        raise ValueError(
            f"depth={depth} is {blocks}, one for each stage, and strides={list(strides)} has another number of stages"
        )
    return blocks


def _velocity(velocity: str | Callable[[int], nn.Module] | None, channels: int) -> nn.Module | None:
    """Build the module that computes a stage's first velocity; None for zero."""
    if velocity is None or callable(velocity):
        return velocity and velocity(channels)
    if velocity != "learned":
        raise ValueError(f"velocity={velocity!r} is neither null, for zero, nor 'learned'")
    return nn.Conv2d(channels, channels, 1, bias=False)
