"""What changes in place between forward and backward, or in a block, is an error that names it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib


class ChangesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@pytest.mark.parametrize("cls", [revlib.CoupledSequential, revlib.ReversibleSequential])
def test_a_block_that_changes_its_input_in_place_is_named(cls: type[nn.Module]) -> None:
    with pytest.raises(RuntimeError, match=r"stack\.1 \(ChangesItsInput\) changes its input in place"):
        cls(nn.Linear(4, 4), ChangesItsInput())(torch.randn(2, 8))


class SpoilsItsOwn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        y.add_(1)
        return y


@pytest.mark.parametrize("cls", [revlib.CoupledSequential, revlib.ReversibleSequential])
def test_what_autograd_refuses_is_refused(cls: type[nn.Module]) -> None:
    stack = cls(nn.Linear(4, 4), SpoilsItsOwn())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stack(torch.randn(2, 8)).sum().backward()


def test_a_parameter_changed_before_backward_is_named() -> None:
    stack = revlib.ReversibleSequential(nn.Linear(4, 4), nn.Linear(4, 4))
    loss = stack(torch.randn(2, 8)).sum()
    with torch.no_grad():
        stack[1].bias.add_(1)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match=r"parameter 'bias' of Linear\(.*\) has been modified"):
        loss.backward()


class Biased(nn.Module):
    """Has a parameter and a module, whose text takes lines of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.layer = nn.Parameter(torch.zeros(4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + self.bias).tanh()


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint", "selective"])
def test_an_error_about_state_is_one_line_with_the_path(treatment: Any) -> None:
    model = nn.ModuleDict({"body": revlib.CoupledSequential(Biased(), Biased())})
    revlib.swap(model, {"body": {"treatments": [treatment] * 2}})
    loss = model["body"](torch.randn(2, 8)).sum()
    with torch.no_grad():
        model["body"][1].bias.add_(1)  # type: ignore[index]
    message = r"^body\.1 \(Biased\): parameter 'bias' of Biased\(\) has been modified in place .*after backward$"
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


class Shifts(nn.Module):
    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        return (x + by).tanh()


def test_an_argument_changed_before_backward_is_named() -> None:
    stack, by = revlib.ReversibleSequential(Shifts(), Shifts()), torch.ones(4)
    loss = stack(torch.randn(2, 8, requires_grad=True), by).sum()
    by.zero_()
    with pytest.raises(RuntimeError, match=r"an argument of shape \[4\] has been modified in place"):
        loss.backward()


def test_what_changes_between_two_backwards_through_further_outputs() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y.tanh(), y.sin()

    stack: Any = revlib.ReversibleSequential(*[Two(64, 64) for _ in range(4)]).double()
    _, extras = stack(torch.randn(64, 128, dtype=torch.float64))
    (last,) = extras[3]
    torch.autograd.grad(last.sum(), list(stack[3].parameters()), retain_graph=True)
    with torch.no_grad():
        stack[2].weight.add_(1)
    with pytest.raises(RuntimeError, match=r"parameter 'weight' of Two.* has been modified in place"):
        extras[0][0].sum().backward()


def test_changing_the_output_in_place_is_refused() -> None:
    y = revlib.ReversibleSequential(nn.Linear(4, 4))(torch.randn(2, 8))
    y.add_(1)
    with pytest.raises(RuntimeError, match="output of a reversible stack has been modified by an inplace operation"):
        y.sum().backward()


class Fickle(nn.Module):
    """Saves more tensors each time it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(next(self.calls)):
            x = self.layer(x).tanh()
        return x


def test_a_block_that_is_not_repeatable_is_named() -> None:
    stack = revlib.ReversibleSequential(nn.Linear(4, 4), Fickle())
    with pytest.raises(RuntimeError, match=r"stack\.1 \(Fickle\) computes something else in backward"):
        stack(torch.randn(2, 8)).sum().backward()


TREATMENTS = ["reversible", "checkpoint", "selective"]


class Accumulates(nn.Module):
    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        out = torch.tanh(x + state)
        state += 0.5
        return out


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_block_that_changes_its_argument_is_named(treatment: Any) -> None:
    stack = revlib.ReversibleSequential(Accumulates(), treatments=[treatment])
    with pytest.raises(RuntimeError, match=r"stack\.0 \(Accumulates\): an argument of shape \[3\] is changed in place"):
        stack(torch.randn(2, 6, requires_grad=True), torch.zeros(3))


@pytest.mark.parametrize("width", [8, 4096])
def test_a_coupling_whose_inverse_changes_a_stream_is_named(width: int) -> None:
    stack = revlib.ReversibleSequential(
        *[nn.Tanh() for _ in range(3)],
        coupling_forward=lambda a, f: a + f,
        coupling_inverse=lambda out, f: out.sub_(f),
    )
    with pytest.raises(RuntimeError, match=r"stack\.2 \(Tanh\): the inverse of its coupling, Pair.*changes a stream"):
        stack(torch.randn(16, width, requires_grad=True)).sum().backward()


class Reads(nn.Module):
    def forward(self, x: Tensor, total: Tensor) -> Tensor:
        return torch.tanh(x) * torch.exp(total.sum())


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_an_argument_that_a_stored_block_changes(treatment: Any) -> None:
    stack = revlib.ReversibleSequential(Reads(), Accumulates(), treatments=[treatment, "store"])
    y = stack(torch.randn(2, 6, requires_grad=True), torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"stack\.0 \(Reads\): an argument of shape \[3\] has been modified"):
        y.sum().backward()
