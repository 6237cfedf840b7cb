"""What a model's code does between the layers of a list: random numbers, modes, autocast, changes in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib

TREATMENTS = ["reversible", "checkpoint", "selective"]


Loop = Callable[[nn.ModuleList, Tensor], Tensor]


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, x: Tensor, by: Tensor | float = 0.0) -> Tensor:
        return self.dropout(torch.tanh(self.layer(x) + by))


def gradients(loop: Loop, treatment: str, layers: list[Any]) -> list[Tensor]:
    net = revlib.ReversibleModuleList(copy.deepcopy(layers), coupling="midpoint", treatments=[treatment] * len(layers))
    torch.manual_seed(1)
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6).requires_grad_()
    y = loop(net, x)
    torch.rand(3)  # as training does
    y.square().sum().backward()
    return [y.detach(), *[t.grad if t.grad is not None else torch.zeros(()) for t in (x, *net.parameters())]]


def draws(net: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in net:
        torch.rand([])
        x = layer(x)
    return x


def draws_an_argument(net: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in net:
        x = layer(x, torch.randn_like(x))
    return x


def seeds(net: nn.ModuleList, x: Tensor) -> Tensor:
    for seed, layer in enumerate(net):
        torch.manual_seed(seed)
        x = layer(x)
    return x


def sets_modes(net: nn.ModuleList, x: Tensor) -> Tensor:
    for index, layer in enumerate(net):
        layer.train(index == 1)
        x = layer(x)
        layer.train()
    return x


def freezes(net: nn.ModuleList, x: Tensor) -> Tensor:
    for index, layer in enumerate(net):
        layer.requires_grad_(index != 1)
        x = layer(x)
        layer.requires_grad_()
    return x


def without_gradients(net: nn.ModuleList, x: Tensor) -> Tensor:
    for index, layer in enumerate(net):
        with torch.set_grad_enabled(index != 1):
            x = layer(x)
    return x


def within_autocast(net: nn.ModuleList, x: Tensor) -> Tensor:
    for index, layer in enumerate(net):
        with torch.autocast("cpu", torch.bfloat16, enabled=index == 1):
            x = layer(x)
    return x


def of_other_parameters(net: nn.ModuleList, x: Tensor) -> Tensor:
    for index, layer in enumerate(net, 1):
        x = torch.func.functional_call(layer, {name: p * index for name, p in layer.named_parameters()}, (x,))
    return x


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize(
    "loop",
    [draws, draws_an_argument, seeds, sets_modes, freezes, without_gradients, within_autocast, of_other_parameters],
    ids=lambda loop: loop.__name__,
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_a_model_does_between_layers(dropout: float, loop: Loop, treatment: str) -> None:
    torch.manual_seed(0)
    layers = [Shifted().double() for _ in range(4)]
    for layer in layers:
        layer.dropout.p = dropout
    expected, found = (gradients(loop, each, layers) for each in ("store", treatment))
    tolerance = 1e-2 if loop is within_autocast else 1e-9
    assert all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in zip(found, expected, strict=True))


def moves_an_argument(net: nn.ModuleList, x: Tensor) -> Tensor:
    by = torch.zeros(6, dtype=torch.float64)
    for layer in net:
        x = layer(x, by)
        by += 1
    return x


def changes_a_bias(net: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in net:
        x = layer(x)
        with torch.no_grad():
            layer.layer.bias += 1
    return x


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize(("loop", "what"), [(moves_an_argument, r"shape \[6\]"), (changes_a_bias, "'bias' of Linear")])
def test_what_is_changed_in_place_before_the_forward_ends(loop: Loop, what: str, treatment: str) -> None:
    with pytest.raises(RuntimeError, match=f"{what}.* has been modified in place since the"):
        gradients(loop, treatment, [Shifted().double() for _ in range(3)])


@pytest.mark.parametrize("grad", [False, True])
def test_hidden_states_that_are_added_up_in_place(grad: bool) -> None:
    net, x = revlib.ReversibleModuleList([Shifted() for _ in range(3)], coupling="midpoint"), torch.randn(2, 6)
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"\[2, 6\] was modified in place between two"):
        for index, layer in enumerate(net):
            x = layer(x)
            if index == 0:
                total = x.detach()
            else:
                total += x.detach()
