"""Kinds of blocks that random programs consist of, each for streams of certain layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.nn.conditions.blocks import Checkpointed

WIDTH, TOKENS, SIDE, BATCH = 6, 4, 4, 4
SHAPES = {"rows": (BATCH, WIDTH), "tokens": (BATCH, TOKENS, WIDTH), "images": (BATCH, WIDTH, SIDE, SIDE)}
CHANNELS = {"rows": 1, "tokens": 2, "images": 1}  # the dimension of the channels


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Attention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, dropout=dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Counter(nn.Module):
    """Reads and changes buffers: a counter in place, an average by a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        out = x * (1 + 0.1 * self.calls) + self.mean
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean().to(self.mean.dtype)
        return out.to(x.dtype)


class Cube(torch.autograd.Function):
    """x^3; its backward asks for its saved tensor twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] * ctx.saved_tensors[0] * grad


def force(x: Tensor) -> Tensor:
    """Return the gradient of an energy, by autograd inside the block."""
    position = x if x.requires_grad and torch.is_grad_enabled() else x.detach().clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(position.tanh().square().sum(), position, create_graph=True)[0]


def noise(x: Tensor) -> Tensor:
    return x * torch.rand_like(x) + 0.1 * torch.randn(x.shape, dtype=x.dtype)


def in_place(x: Tensor) -> Tensor:
    return x.mul(0.5).add_(0.1).sigmoid_()


def turned(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


class Block(nn.Module):
    """What a block does besides `body`, as its options say: it takes arguments, returns extras, is in-place or frozen.

    `out` is the number of channels of its branch, `dim` the dimension of the channels.
    """

    def __init__(self, body: nn.Module, mix: nn.Module, takes: str, returns: str, dim: int) -> None:
        super().__init__()
        self.body, self.mix, self.takes, self.returns, self.dim = body, mix, takes, returns, dim

    def forward(self, x: Tensor, shift: Any = None, *, memory: Any = None) -> Any:
        if shift is not None and self.takes == "all":
            x = x + shift
        if memory is not None and self.takes != "nothing":
            x = x * memory["scale"].sigmoid()
        out = self.mix(self.body(x))
        if self.returns == "tuple":
            return out, x.square().mean(), None
        return {"out": out, "loss": x.square().mean()} if self.returns == "dict" else out


def _dense(out: int, layout: str) -> nn.Module:
    return nn.Conv2d(WIDTH, out, 1) if layout == "images" else nn.Linear(WIDTH, out)


def _norm(layout: str) -> nn.Module:
    return nn.GroupNorm(2, WIDTH) if layout == "images" else nn.LayerNorm(WIDTH)


def _batch_norm(layout: str, **options: Any) -> nn.Module:
    return nn.BatchNorm2d(WIDTH, **options) if layout == "images" else nn.BatchNorm1d(WIDTH, **options)


# Bodies by name: what makes one for a layout, and the layouts that it is for.
EVERYWHERE = tuple(SHAPES)
BODIES: dict[str, tuple[Callable[[str], nn.Module], tuple[str, ...]]] = {
    "identity": (lambda layout: nn.Identity(), EVERYWHERE),
    "tanh": (lambda layout: nn.Tanh(), EVERYWHERE),
    "mlp": (lambda layout: nn.Sequential(_norm(layout), _dense(WIDTH, layout), nn.GELU()), EVERYWHERE),
    "elu in-place": (lambda layout: nn.Sequential(_dense(WIDTH, layout), nn.ELU(inplace=True)), EVERYWHERE),
    "in-place": (lambda layout: Apply(in_place), EVERYWHERE),
    "dropout": (lambda layout: nn.Sequential(nn.Dropout(0.3), nn.Tanh()), EVERYWHERE),
    "alpha dropout": (lambda layout: nn.Sequential(nn.Tanh(), nn.AlphaDropout(0.2)), EVERYWHERE),
    "noise": (lambda layout: Apply(noise), EVERYWHERE),
    "batch norm": (lambda layout: nn.Sequential(_batch_norm(layout), nn.ReLU()), ("rows", "images")),
    "cumulative batch norm": (lambda layout: _batch_norm(layout, momentum=None), ("rows", "images")),
    "instance norm": (lambda layout: nn.InstanceNorm2d(WIDTH, track_running_stats=True), ("images",)),
    "spectral norm": (lambda layout: parametrizations.spectral_norm(_dense(WIDTH, layout)), EVERYWHERE),
    "weight norm": (lambda layout: parametrizations.weight_norm(_dense(WIDTH, layout)), EVERYWHERE),
    "counter": (lambda layout: Counter(), EVERYWHERE),
    "convolution": (lambda layout: nn.Conv2d(WIDTH, WIDTH, 3, padding=1), ("images",)),
    "attention": (lambda layout: Attention(0.0), ("tokens",)),
    "attention, dropout": (lambda layout: Attention(0.2), ("tokens",)),
    "recurrent": (lambda layout: Recurrent(), ("tokens",)),
    "checkpointed": (
        lambda layout: Checkpointed(nn.Sequential(_dense(WIDTH, layout), nn.Dropout(0.2), nn.Tanh())),
        EVERYWHERE,
    ),
    "function": (lambda layout: nn.Sequential(nn.Tanh(), Apply(Cube.apply)), EVERYWHERE),
    "autograd inside": (lambda layout: Apply(force), EVERYWHERE),
    "softmax": (lambda layout: nn.Softmax(-1), EVERYWHERE),
    "turned": (lambda layout: nn.Sequential(_dense(WIDTH, layout), Apply(turned)), EVERYWHERE),
    "half detached": (lambda layout: Apply(lambda x: x.detach() * x.sin()), EVERYWHERE),
}
CHANGES_BUFFERS = ("batch norm", "instance norm", "spectral norm", "counter")
# Bodies whose output for a sample depends on that sample alone, in any order of the samples.
BY_SAMPLE = sorted(BODIES.keys() - {"batch norm", "cumulative batch norm", "instance norm", "counter", "turned"})


class Repeat(nn.Module):
    """A tensor, as often as a wide branch needs it: without parameters, which saves nothing."""

    def __init__(self, times: int, dim: int) -> None:
        super().__init__()
        self.times, self.dim = times, dim

    def forward(self, x: Tensor) -> Tensor:
        return x if self.times == 1 else torch.cat([x] * self.times, self.dim)


def make(body: str, layout: str, *, mix: bool, takes: str, returns: str, frozen: bool, times: int) -> nn.Module:
    """Return a block: its body, and after it a layer that mixes channels, or repeats them, into `times` as many."""
    dim = CHANNELS[layout]
    last = _dense(times * WIDTH, layout) if mix else Repeat(times, dim)
    block = Block(BODIES[body][0](layout), last, takes, returns, dim)
    if frozen:
        block.requires_grad_(False)
    return block


class Roll(nn.Module):
    """An invertible step: a fixed permutation."""

    exact = True

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, dims=1)

    def inverse(self, y: Tensor) -> Tensor:
        return y.roll(-1, dims=1)


class Stretch(nn.Module):
    """An invertible step with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log.exp().to(x.dtype)

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log).exp().to(y.dtype)


class TwoBranches(nn.Module):
    """A residual block of two branches, which `branches=[["first"], ["second"]]` makes steps of their own."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)
