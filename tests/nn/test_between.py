"""What a model's code does between the layers of a list, and what blocks and couplings change that they should not."""

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
    with pytest.raises(RuntimeError, match=f"{what}.* has been modified in place since the forward"):
        gradients(loop, treatment, [Shifted().double() for _ in range(3)])


class Accumulates(nn.Module):
    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        out = torch.tanh(x + state)
        state += 0.5
        return out


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_block_that_changes_its_argument_is_named(treatment: Any) -> None:
    stack = revlib.ReversibleSequential(Accumulates(), treatments=[treatment])
    with pytest.raises(RuntimeError, match=r"stack\.0 \(Accumulates\) changes an argument of shape \[3\] in place"):
        stack(torch.randn(2, 6, requires_grad=True), torch.zeros(3))


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


def test_a_layer_is_in_one_reversible_list_only() -> None:
    layers = [nn.Linear(4, 4) for _ in range(2)]
    revlib.ReversibleModuleList(layers, coupling="midpoint")
    with pytest.raises(ValueError, match=r"layers\.1 \(Linear\) is a layer of layers, too, which runs it reversibly"):
        revlib.ReversibleModuleList([nn.Linear(4, 4), layers[0]], coupling="additive")


@pytest.mark.parametrize("width", [8, 4096])
def test_a_coupling_whose_inverse_changes_a_stream_is_named(width: int) -> None:
    stack = revlib.ReversibleSequential(
        *[nn.Tanh() for _ in range(3)],
        coupling_forward=lambda a, f: a + f,
        coupling_inverse=lambda out, f: out.sub_(f),
    )
    with pytest.raises(RuntimeError, match=r"stack\.2 \(Tanh\): the inverse of its coupling, Pair.*changes a stream"):
        stack(torch.randn(16, width, requires_grad=True)).sum().backward()


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.s, self.t = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.s(x), self.t(x)], 1)


def test_the_inverse_of_steps_in_chunks() -> None:
    blocks = [Doubled() for _ in range(3)]
    stack = revlib.CoupledSequential(*blocks, split_dim=-1, coupling="affine", chunks=[1, 2], chunk_dim=1)
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    assert torch.allclose(stack.inverse(stack(x)), x)


def test_the_inverse_names_a_block_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"stack\.0 \(Linear\) returned shape \[2, 1\]"):
        revlib.CoupledSequential(nn.Linear(4, 1)).inverse(torch.randn(2, 8))


class Energy(nn.Module):
    """The gradient of an energy, which it takes in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4).double(), nn.BatchNorm1d(4).double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.norm(self.layer(x)).tanh().sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("treatments", [["reversible", "checkpoint"], ["reversible", "store", "reversible"]])
def test_a_first_call_in_which_a_later_part_calls_autograd(treatments: Any) -> None:
    torch.manual_seed(0)
    blocks = [*[nn.Linear(4, 4).double() for _ in treatments[1:]], Energy()]
    stack = revlib.ReversibleSequential(*copy.deepcopy(blocks), treatments=treatments)
    plain = revlib.CoupledSequential(*blocks)
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    assert torch.allclose(torch.autograd.grad(stack(x).square().sum(), x)[0], expected)


class Tells(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.tanh(), x.square().sum()


@pytest.mark.parametrize("width", [8, 8192])
def test_a_loss_on_what_blocks_return_besides_runs_each_once_more(width: int) -> None:
    blocks = [Tells() for _ in range(3)]
    stack = revlib.ReversibleSequential(*blocks, split_dim=None, coupling="midpoint")
    runs: list[int] = []
    for block in blocks:
        block.register_forward_hook(lambda *_: runs.append(1))
    _, extras = stack(torch.randn(16, width, requires_grad=True))
    sum(loss for (loss,) in extras).backward()
    assert len(runs) == 6
