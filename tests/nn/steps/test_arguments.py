"""Arguments of blocks that other blocks have computed, as a relative bias that each layer hands to the next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.nn.state.twins import TREATMENTS


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8).double()

    def forward(self, x: Tensor, biases: tuple[Tensor | None, Tensor], scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.layer(x).tanh() * biases[1] * scale
        return y, y * 2, y.cos()


class Model(nn.Module):
    def __init__(self, cls: Any, **options: Any) -> None:
        super().__init__()
        self.layers = cls([Biased() for _ in range(3)], coupling="midpoint", **options)

    def forward(self, x: Tensor) -> Tensor:
        bias, scale = torch.ones_like(x), torch.ones_like(x)
        for layer in self.layers:
            x, bias, scale = layer(x, (None, bias), scale=scale)
        return x


@pytest.mark.parametrize("differentiate", [True, False])
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_arguments_with_a_graph_are_freed(treatment: Any, differentiate: bool, without_collector: None) -> None:
    model, x, live = Model(revlib.ReversibleModuleList, treatments=[treatment] * 3), torch.randn(64, 8).double(), []
    with revlib.MemoryMeter() as meter:
        for _ in range(3):
            y = model(x)
            if differentiate:
                torch.autograd.grad(y.sum(), list(model.parameters()))
            del y
            live.append(meter.live)
    assert live[0] == live[1] == live[2]


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_gradients_through_arguments(treatment: Any) -> None:
    model = Model(revlib.ReversibleModuleList, treatments=[treatment] * 3)
    plain = Model(revlib.ReversibleModuleList, treatments=["store"] * 3)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 8, requires_grad=True, dtype=torch.float64)
    found = [torch.autograd.grad(each(x).square().sum(), [x, *each.parameters()]) for each in (model, plain)]
    assert all(map(torch.allclose, *found))


class Frozen(dict[str, Any]):
    """A dict that can be changed no more, once it has been made."""

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("frozen")


class Notes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).double()

    def forward(self, x: Tensor, read: list[Tensor], written: list[Tensor], options: Frozen) -> Tensor:
        out = torch.tanh(self.linear(x)) * options["scale"] + sum(t.mean() for t in read)
        written.append(out.detach())
        return out


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint"])
def test_one_list_given_twice_and_a_dict_that_cannot_be_changed(treatment: str) -> None:
    torch.manual_seed(0)
    blocks, x, grads = [Notes() for _ in range(3)], torch.randn(2, 8, dtype=torch.float64, requires_grad=True), []
    scale = torch.ones((), dtype=torch.float64, requires_grad=True) * 2
    for name in ("store", treatment):
        seen: list[Tensor] = []
        y = revlib.ReversibleSequential(*blocks, treatments=[name] * 3)(x, seen, seen, Frozen(scale=scale))
        grads.append(torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0])
        assert len(seen) == 3
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint", "selective"])
def test_a_tensor_that_is_passed_twice_is_the_same_in_the_second_run(treatment: str) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)

        def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out: Tensor = self.attend(x, key, value, need_weights=False)[0]
            return out * (key.mean() if key is value else 2 * value.mean())

    torch.manual_seed(0)
    blocks, encoder = [Cross(), Cross()], nn.Linear(8, 8, dtype=torch.float64)
    x, given = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    found = []
    for each in (treatment, "store"):
        stack = revlib.ReversibleSequential(*blocks, split_dim=None, coupling="midpoint", treatments=[each] * 2)
        memory = encoder(given)
        y = stack(x, key=memory, value=memory)
        found.append(torch.autograd.grad(y.square().sum(), [*stack.parameters(), *encoder.parameters()]))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9)
