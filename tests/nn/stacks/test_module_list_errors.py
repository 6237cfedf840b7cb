"""Loops over a list that cannot be reversed are errors that say why."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_revlib as revlib
from tests.nn.stacks.looping_model import Model


class Order(Model):
    order: tuple[Any, ...] = ()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        for entry in self.order:
            x = entry(x) if callable(entry) else self.layers[entry](x)
        return x.sum()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((0, 1, 1, 2, 3, 4), r"layers\.1 \(Layer\) was called a second time, after layers\.1 \(Layer\)"),
        ((0, 0, 1, 2, 3, 4), r"layers\.0 \(Layer\) was called a second time, after layers\.0 \(Layer\)"),
        ((0, 2, 3, 4), r"layers\.2 \(Layer\) was called where layers\.1 \(Layer\) was due, after layers\.0"),
        ((1, 0, 2, 3, 4), r"layers\.1 \(Layer\) was called before layers\.0 \(Layer\)"),
        ((0, 1, 0, 1, 2, 3, 4), r"layers\.0 \(Layer\) was called where layers\.2 \(Layer\) was due, after layers\.1"),
        ((0, 1, 2, 3, 4, 2), r"layers\.2 \(Layer\) was called before layers\.0"),
        ((0, lambda x: x + 1, 1, 2, 3, 4), r"layers\.1 .* with something else than what layers\.0 .* had returned"),
        ((0, lambda x: x.add_(1), 1, 2, 3, 4), "was modified in place between two layers"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_calls_that_cannot_be_reversed_are_explained(order: Any, message: str, grad: bool) -> None:
    model = Order()
    model.order = order
    plain = copy.deepcopy(model)
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError), match=message):
        model(torch.randn(2, 6))
    revlib.restore(model)
    x = torch.randn(2, 6)
    assert torch.equal(model(x), plain(x))


def test_layers_that_change_the_shape() -> None:
    class Wider(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.linear = nn.Linear(i, o)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    model = Order()
    model.layers = nn.ModuleList([Wider(6, 8), Wider(8, 8), Wider(8, 4)])
    model.order = (0, 1, 2)
    revlib.swap(model, {"layers": {"ordinary": 1}})
    with pytest.raises(ValueError, match=r"layers\.2 \(Wider\) returned shape \[2, 4\]"):
        model(torch.randn(2, 6))
    model.layers[2] = Wider(8, 8)
    with pytest.raises(RuntimeError, match="layers: its layers are others than when it was swapped"):
        model(torch.randn(2, 6))
    revlib.swap(model, {"layers": {"ordinary": 1}})
    model(torch.randn(2, 6)).backward()


def test_checkpointing_round_the_layers_is_refused() -> None:
    class Layer(nn.Linear):
        gradient_checkpointing = True

        def __call__(self, x: Tensor) -> Any:
            return checkpoint(super().__call__, x, use_reentrant=False)

    layers = revlib.ReversibleModuleList([Layer(8, 8) for _ in range(3)], coupling="midpoint")
    with pytest.raises(ValueError, match=r"0 \(Layer\): gradient checkpointing is on.*gradient_checkpointing_disable"):
        layers[0](torch.randn(4, 8))


def test_torch_func_is_refused_with_the_way_out() -> None:
    model = Model()
    revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True}})
    with pytest.raises(RuntimeError, match=r"restore\(model\) makes them ordinary"):
        torch.func.grad(model)(torch.randn(2, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_dim": 1}, "target 'layers': split_dim=1: layers that their model calls see the whole stream"),
        ({"ordinary": 5}, "target 'layers': ordinary=5: of 5 blocks, 0 to 4"),
        ({"coupling": "bdia"}, "target 'layers': coupling 'bdia' works on the exact grid only"),
    ],
)
def test_wrong_options_leave_the_model_as_it_was(options: Any, message: str) -> None:
    model = Model()
    before = [(name, type(m), set(m.__dict__)) for name, m in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        revlib.swap(model, {"layers": options})
    assert [(name, type(m), set(m.__dict__)) for name, m in model.named_modules()] == before


def test_a_layer_is_in_one_reversible_list_only() -> None:
    layers = [nn.Linear(4, 4) for _ in range(2)]
    revlib.ReversibleModuleList(layers, coupling="midpoint")
    with pytest.raises(ValueError, match=r"layers\.1 \(Linear\) is a layer of layers, too, which runs it reversibly"):
        revlib.ReversibleModuleList([nn.Linear(4, 4), layers[0]], coupling="additive")
