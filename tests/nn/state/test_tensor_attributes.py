"""Tensors among a block's attributes: set before each forward by their owner, or by the block's own calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.nn.state.twins import TREATMENTS, sample, twins


class Styled(nn.Module):
    """Normalises to a style that is set before each forward, as AdaIN in MUNIT."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.weight, self.bias = nn.Linear(4, 4).double(), None, None

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None and self.bias is not None
        return torch.tanh(nn.functional.layer_norm(self.layer(x), (4,)) * self.weight + self.bias)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_styles_set_before_each_of_two_forwards(treatment: Any, order: int) -> None:
    styles = nn.Linear(2, 3 * 2 * 4).double()
    x, drawn = sample(), torch.randn(2, 2).double()

    def gradients(stack: nn.Module) -> list[Tensor]:
        losses = []
        for style in drawn:
            for block, (weight, bias) in zip(stack.children(), styles(style).view(3, 2, 4), strict=True):
                block.weight, block.bias = weight, bias
            losses.append(stack(x).square().sum())
        leaves = [x, *styles.parameters(), *stack.parameters()]
        grads = torch.autograd.grad(losses[0] * losses[1], leaves, create_graph=order == 2)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)) if order == 2 else list(grads)

    stack, plain = twins(Styled, treatment)
    assert all(map(torch.allclose, gradients(stack), gradients(plain)))


class Spiking(nn.Module):
    """Keeps its membrane potential, with its graph, from one call to the next; makes it in the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        before = self.potential * 0.5 if hasattr(self, "potential") else 0.0
        self.potential = before + self.layer(x).tanh()
        return self.potential.sin()


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_potential_over_several_calls(treatment: Any) -> None:
    stack, plain = twins(Spiking, treatment)
    x = sample()
    found = []
    for each in (stack, plain):
        loss = torch.stack([each(x * k).square().sum() for k in (1, 2, 3)]).sum()
        grads = torch.autograd.grad(loss, [x, *each.parameters()])
        found.append([*grads, *[block.potential for block in each.children()]])
    assert all(map(torch.allclose, *found))


class Records(nn.Module):
    """Leaves its attention map, with its graph, in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4).double(), None

    def forward(self, x: Tensor) -> Tensor:
        self.last: Tensor | None = self.layer(x).softmax(-1)
        return self.last * x


@pytest.mark.parametrize("differentiate", [True, False])
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_recorded_map_holds_no_graph_of_calls_before(
    treatment: Any, differentiate: bool, without_collector: None
) -> None:
    stack, _ = twins(Records, treatment)
    x = torch.randn(64, 8).double()
    live = []
    with revlib.MemoryMeter() as meter:
        for _ in range(4):
            y = stack(x)
            if differentiate:
                torch.autograd.grad(y.sum(), list(stack.parameters()))
            del y
            live.append(meter.live)
    assert live[1] == live[2] == live[3]


def fails(change: Callable[[nn.Module], object], block: nn.Module) -> str:
    """Return the error of a step in which the attributes of blocks are changed between forward and backward."""
    stack = revlib.ReversibleSequential(*[copy.deepcopy(block) for _ in range(2)])
    with pytest.raises(RuntimeError) as error:
        y = stack(sample())
        for each in stack:
            change(each)
        y.sum().backward()
    return str(error.value)


class Scaled(nn.Module):
    """Multiplies by an attribute, which it may count up in place."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.scale, self.counts = torch.ones(4).double(), counts

    def forward(self, x: Tensor) -> Tensor:
        y = x.tanh() * self.scale
        if self.counts:
            self.scale += 1
        return y


def test_an_attribute_modified_in_place_is_named() -> None:
    error = fails(lambda block: block.scale.mul_(2), Scaled(counts=False))  # type: ignore[operator, union-attr]
    assert "attribute 'scale' of Scaled() has been modified in place since the forward" in error


def test_an_attribute_that_its_block_modifies_is_named_in_forward() -> None:
    assert "attribute 'scale' of Scaled() is changed in place by its own call" in fails(print, Scaled(counts=True))


def test_a_tensor_that_is_set_anew_before_backward() -> None:
    block = Scaled(counts=False)
    stack, x = revlib.ReversibleSequential(block), sample()
    expected = torch.autograd.grad(stack(x).square().sum(), x)[0]
    y = stack(x).square().sum()
    block.scale = other = torch.zeros(4).double()
    assert torch.allclose(torch.autograd.grad(y, x)[0], expected)
    assert block.scale is other


def test_report_leaves_tensors_as_they_were() -> None:
    stack, _ = twins(Spiking, "reversible")
    model = nn.Sequential(stack)
    model(sample())
    before = [block.potential for block in stack.children()]
    revlib.report(model, sample())
    assert all(block.potential is t for block, t in zip(stack.children(), before, strict=True))
