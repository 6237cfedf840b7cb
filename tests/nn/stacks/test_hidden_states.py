"""What a list hands out between its layers: gradients pass through it, and models may read it, or leave the list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_revlib as revlib
from lightning_revlib.nn.coupling.exact import round_to_grid
from tests.nn.stacks.looping_model import Layer, close

COUPLINGS: list[dict[str, Any]] = [
    *[{"coupling": name} for name in ("additive", "midpoint", "leapfrog", "scaled")],
    {"coupling": {"name": "momentum", "gamma": 0.3}},
    {"coupling": "bdia", "grid_bits": 12},
    {"coupling": "additive", "grid_bits": 12},
]
DEPTH = 4


def states_of(layers: Any, x: Tensor) -> list[Tensor]:
    """Return the hidden states that a list hands out, the input first."""
    torch.manual_seed(1)
    states = [x]
    for layer in layers:
        states.append(layer(states[-1]))
    return states


def states_by_hand(layers: Any, x: Tensor, coupling: Any, grid_bits: int | None = None) -> list[Tensor]:
    torch.manual_seed(1)
    coupling, states = revlib.get_coupling(coupling), [x]
    if grid_bits is not None:
        coupling, x = coupling.on_grid(grid_bits), round_to_grid(x, grid_bits)
    a, b = coupling.start(x)
    for layer in layers:
        a, b = coupling.forward(a, b, layer(b) - b)
        states.append(b)
    return [*states[:-1], coupling.finish(a, b)]


def last(states: list[Tensor]) -> Tensor:
    return states[-1].square().sum()


def every_one(states: list[Tensor]) -> Tensor:
    return torch.stack(states).tanh().square().sum()


def one_between(states: list[Tensor]) -> Tensor:
    return states[2].square().sum()


def some_together(states: list[Tensor]) -> Tensor:
    return (states[1] * states[3]).sum() + states[3].square().sum() + states[-1].sum()


@pytest.mark.parametrize("loss", [last, every_one, one_between, some_together], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("options", COUPLINGS, ids=str)
def test_gradients_pass_through_hidden_states_and_their_readers(options: Any, loss: Any) -> None:
    layers = [Layer(6, dropout=0.2).double() for _ in range(DEPTH)]
    x, found = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), []
    swapped = revlib.ReversibleModuleList(layers, residual=True, **options)
    for run in (lambda: states_of(swapped, x), lambda: states_by_hand(layers, x, **options)):
        states, fired = run(), []
        for state in states[1:]:
            state.retain_grad()
            state.register_hook(lambda grad, fired=fired: fired.append(1))
        parameters = [p for layer in layers for p in layer.parameters()]
        for t in (x, *parameters):
            t.grad = None
        loss(states).backward()
        found.append([t.grad if t.grad is not None else torch.zeros_like(t) for t in (*states[1:], x, *parameters)])
        found[-1].append(torch.tensor(float(len(fired))))
        swapped.release()
    close(*found)


def test_hooks_on_hidden_states_change_the_gradient() -> None:
    layers = [Layer(6).double() for _ in range(DEPTH)]
    x, found = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), []
    swapped = revlib.ReversibleModuleList(layers, residual=True, coupling="midpoint")
    for run in (lambda: states_of(swapped, x), lambda: states_by_hand(layers, x, "midpoint")):
        states = run()
        states[2].register_hook(lambda grad: 3 * grad)
        found.append(list(torch.autograd.grad(last(states), x)))
        swapped.release()
    close(*found)


def test_hidden_states_of_half_precision_with_streams_of_float32() -> None:
    layers = [Layer(6).bfloat16() for _ in range(DEPTH)]
    swapped = revlib.ReversibleModuleList(layers, residual=True, coupling="midpoint")
    states = states_of(swapped, torch.randn(3, 6, dtype=torch.bfloat16))
    for state in states[1:]:
        state.retain_grad()
    last(states).backward()
    assert all(state.grad is not None and state.grad.any() for state in states[1:])


class Leaving(torch.nn.Module):
    """Leaves its list after some layers, with what they have returned besides, or the hidden state."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, count: int, extras: bool) -> Tensor:
        losses = []
        for layer in list(self.layers)[:count]:
            x, norm = layer(x)
            losses.append(norm)
        return torch.stack(losses).sum() + (0 if extras else x.square().sum())


@pytest.mark.parametrize("treatments", [["reversible"] * 4, ["checkpoint", *["reversible"] * 3], ["store"] * 4])
@pytest.mark.parametrize("extras", [True, False])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_leaving_early(count: int, extras: bool, treatments: list[str]) -> None:
    model = Leaving(torch.nn.ModuleList([Layer(6, "tuple") for _ in range(DEPTH)])).double()
    x, found = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), []
    for each in (["store"] * DEPTH, treatments):
        revlib.swap(model, {"layers": {"coupling": "midpoint", "residual": True, "treatments": each}})
        inputs = [x, *list(model.layers[:count].parameters())]
        found.append(list(torch.autograd.grad(model(x, count, extras), inputs)))
        model(x, DEPTH, extras).backward()  # the next forward is a new one
    close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hidden_state_that_is_detached_between_layers(dtype: torch.dtype) -> None:
    layers = revlib.ReversibleModuleList([Layer(8).to(dtype) for _ in range(3)], coupling="midpoint", residual=True)
    x = torch.randn(2, 8, dtype=dtype)
    for layer in layers:
        x = layer(x).detach() if layer is layers[1] else layer(x)
    x.float().sum().backward()
    assert layers[1].linear.weight.grad is None and layers[2].linear.weight.grad is not None
    assert layers[0].linear.weight.grad is not None  # by the other stream


@dataclass
class Computed:
    """Computes from its first member when it is made."""

    hidden: Tensor
    size: int = 0

    def __post_init__(self) -> None:
        self.size = self.hidden.numel()


def test_a_layer_that_returns_a_dataclass_that_computes() -> None:
    class Returns(Layer):
        def forward(self, hidden: Tensor) -> Any:  # type: ignore[override]
            return Computed(super().forward(hidden))

    layers, x = revlib.ReversibleModuleList([Returns(8) for _ in range(2)], coupling="midpoint"), torch.randn(2, 8)
    for layer in layers:
        out = layer(x)
        x = out.hidden
    x.sum().backward()
    assert out.size == 16 and type(out) is Computed
