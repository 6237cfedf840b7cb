"""A model that loops over a ModuleList, and its gradients."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lightning_revlib as revlib

Pair = namedtuple("Pair", ["hidden", "norm"])


@dataclass
class Output:
    hidden: Tensor
    norm: Tensor


RETURNS = {
    "tensor": lambda y, n: y,
    "tuple": lambda y, n: (y, n),
    "list": lambda y, n: [y, n],
    "named tuple": Pair,
    "dict": lambda y, n: OrderedDict(hidden=y, norm=n),
    "dataclass": Output,
}


class Layer(nn.Module):
    """A residual layer with a mask, dropout and a further output."""

    def __init__(self, width: int, returns: str = "tensor", dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(dropout)
        self.returns = returns

    def forward(self, hidden: Tensor, mask: Tensor | None = None, scale: Any = 1.0) -> Any:
        out = self.dropout(torch.tanh(self.linear(self.norm(hidden)))) * scale
        out = hidden + (out if mask is None else out * mask)
        return RETURNS[self.returns](out, out.pow(2).mean())


class Model(nn.Module):
    """What people write: a loop over a ModuleList between an embedding and a head."""

    def __init__(self, depth: int = 5, width: int = 6, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.layers = nn.ModuleList([Layer(width, **options) for _ in range(depth)])
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: Any = 1.0) -> Tensor:
        x, norms = self.stem(x), x.new_zeros(())
        for layer in self.layers:
            out = layer(hidden=x, mask=mask, scale=scale) if scale is not None else layer(x, mask)
            if isinstance(out, Tensor):
                x = out
            else:
                values = list(out.values()) if isinstance(out, dict) else list(vars(out).values()) if isinstance(
                    out, Output) else out  # fmt: skip
                x, norms = values[0], norms + values[1]
        return self.head(x).sum() + norms


def gradients(model: nn.Module, *args: Any) -> list[Tensor]:
    torch.manual_seed(1)
    inputs = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    loss = model(*inputs)
    targets = [*model.parameters(), *[a for a in inputs if isinstance(a, Tensor) and a.requires_grad]]
    return [loss.detach(), *torch.autograd.grad(loss, [t for t in targets if t.requires_grad], allow_unused=True)]  # type: ignore[list-item]


def stored(model: Any, path: str = "layers") -> Any:
    """Return the gradients of the same function by ordinary autograd."""
    twin = copy.deepcopy(model)
    revlib.swap(twin, {path: {"treatments": ["store"] * len(twin.get_submodule(path))}})
    return twin


def close(xs: list[Tensor], ys: list[Tensor], tolerance: float = 1e-10) -> None:
    for x, y in zip(xs, ys, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
