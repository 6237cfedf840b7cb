"""Sequences of different lengths, as nested tensors of the jagged layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.nn.state.twins import TREATMENTS

COUPLINGS: list[Any] = ["additive", {"name": "momentum", "gamma": 0.5}, "midpoint", "leapfrog"]


def jagged(values: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 3, 8]))


def blocks() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)).double() for _ in range(3)]


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("coupling", COUPLINGS, ids=str)
def test_a_nested_input(coupling: Any, treatment: str) -> None:
    plain = revlib.CoupledSequential(*blocks(), split_dim=None, coupling=coupling)
    stack = revlib.ReversibleSequential(*plain, split_dim=None, coupling=coupling, treatments=[treatment] * 3)
    values = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    leaves = [values, *plain.parameters()]
    found = [torch.autograd.grad(each(jagged(values)).values().square().sum(), leaves) for each in (plain, stack)]
    assert all(map(torch.allclose, *found))
    if treatment == "reversible":
        assert stack.drift < 1e-12


class Pooled(nn.Module):
    """Adds what it finds in sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double()

    def forward(self, x: Tensor, sequences: Tensor) -> Tensor:
        return self.layer(x).tanh() * self.layer(sequences).sin().values().mean()


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_nested_argument(treatment: str) -> None:
    plain = revlib.CoupledSequential(*[Pooled() for _ in range(3)])
    stack = revlib.ReversibleSequential(*plain, treatments=[treatment] * 3)
    x, values = torch.randn(5, 8).double(), torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    leaves = [values, *plain.parameters()]
    found = [torch.autograd.grad(each(x, jagged(values * 2)).square().sum(), leaves) for each in (plain, stack)]
    assert all(map(torch.allclose, *found))


@pytest.mark.parametrize(
    ("options", "layout", "message"),
    [
        ({"split_dim": 1}, torch.jagged, "split_dim=1: an input that is a nested tensor cannot be halved; take split"),
        ({"chunks": 2}, torch.jagged, r"chunks=2: stack.0 \(Sequential\) got a nested tensor, which cannot be cut"),
        ({"memory_budget": "1GiB"}, torch.jagged, "memory_budget='1GiB': stack got a nested tensor, whose bytes"),
        ({}, torch.strided, r"stack.0 \(Sequential\) got a nested tensor of the strided layout, which has no shape"),
    ],
)
def test_what_nested_tensors_do_not_go_with(options: dict[str, Any], layout: torch.layout, message: str) -> None:
    stack = revlib.ReversibleSequential(*blocks(), **{"split_dim": None, "coupling": "midpoint", **options})
    x = torch.nested.nested_tensor([torch.randn(3, 4).double(), torch.randn(5, 4).double()], layout=layout)
    with pytest.raises(TypeError, match=message):
        stack(x)
