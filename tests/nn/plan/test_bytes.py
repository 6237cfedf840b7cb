"""What a plan counts on is what is taken, and never more than the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.nn.plan.workloads import STACKS, autocast, mlp, peak


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", STACKS)
def test_never_over_budget_and_close_to_it(kind: str, half: bool) -> None:
    """Of budgets between `Plan.minimum` and `Plan.plain`: each is another mixture of treatments."""
    make, shape, options = STACKS[kind]
    blocks, x = make(), torch.randn(shape, requires_grad=True)

    def stack_with(budget: Any) -> revlib.ReversibleSequential:
        stack = revlib.ReversibleSequential(*blocks, memory_budget=budget, **options)
        assert stack.plan is None
        if figures:
            stack.budget.load_state_dict(figures)  # type: ignore[union-attr]
        with autocast(half):
            stack(x)
        figures.update(stack.budget.state_dict())  # type: ignore[union-attr]
        return stack

    figures: dict[str, Any] = {}
    whole = stack_with(1.0).plan
    assert whole is not None
    works, mixtures = [], set()
    for fraction in (0, 0.07, 0.15, 0.3, 0.5, 0.75, 1.2):
        budget = int(whole.minimum + fraction * (whole.plain - whole.minimum))
        stack = stack_with(budget)
        taken, output = peak(stack, x, half)
        assert stack.plan is not None and taken <= stack.plan.peak <= budget
        assert stack.plan.peak <= taken + 2 * output + 64  # what is counted on is counted well
        works.append(stack.plan.work)
        mixtures.add(stack.plan.treatments["stack"])
    assert works == sorted(works, reverse=True) and len(mixtures) >= 2
    assert stack.plan is not None and works[-1] == 1
    assert stack.plan.treatments["stack"] == ("store",) * len(blocks)
    with pytest.raises(ValueError, match="need at least"):
        stack_with(whole.minimum - 1)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", STACKS)
def test_the_peak_of_stored_blocks_is_known(kind: str, half: bool) -> None:
    make, shape, options = STACKS[kind]
    if half and "grid_bits" in options:
        pytest.skip("without a budget, exact stacks keep weights as they were cast")
    blocks, x = make(), torch.randn(shape, requires_grad=True)
    stack = revlib.ReversibleSequential(*blocks, memory_budget=1.0, **options)
    with autocast(half):
        stack(x)
    stored = revlib.ReversibleSequential(*blocks, store_last=len(blocks), **options)
    taken, output = peak(stored, x, half)
    assert stack.plan is not None and taken <= stack.plan.plain <= taken + 2 * output + 64


@pytest.mark.parametrize("split_dim", [1, None])
def test_streams_in_channels_last_are_counted(split_dim: int | None) -> None:
    options: dict[str, Any] = {"split_dim": split_dim, "coupling": "additive" if split_dim else "momentum"}
    blocks = [nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(6)]
    stack = revlib.ReversibleSequential(*blocks, memory_budget=0.9, **options).to(memory_format=torch.channels_last)
    x = torch.randn(8, 16 if split_dim else 8, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    peak(stack, x)
    assert stack.plan is not None
    assert peak(stack, x)[0] <= stack.plan.limit


class Further(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.further = mlp(16), nn.Linear(16, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.branch(x), self.further(x).softmax(-1)


def test_further_outputs_are_counted_while_they_are_held() -> None:
    blocks, x = [Further() for _ in range(5)], torch.randn(128, 32, requires_grad=True)
    for value in (0.9, 0.95, 1.0):
        stack = revlib.ReversibleSequential(*blocks, memory_budget=value)
        stack(x)
        for p in [x, *stack.parameters()]:
            p.grad = torch.zeros_like(p)
        with revlib.MemoryMeter() as meter:
            y, further = stack(x)
            y.backward(torch.ones_like(y))
        assert stack.plan is not None and len(further) == 5
        assert meter.peak <= stack.plan.peak <= stack.plan.limit, value


def test_layers_that_a_model_calls() -> None:
    layers = revlib.ReversibleModuleList([mlp(32) for _ in range(6)], coupling="midpoint", memory_budget=0.5)
    x = torch.randn(64, 32, requires_grad=True)

    def run() -> Tensor:
        y = x
        for layer in layers:
            y = layer(y)
        return y

    run()
    for p in layers.parameters():
        p.grad = torch.zeros_like(p)
    with revlib.MemoryMeter() as meter:
        y = run()
        y.backward(torch.ones_like(y))
    assert meter.peak <= layers.plan.limit  # type: ignore[union-attr]


LIGHT: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(64, 64),
    "no bias": lambda: nn.Linear(64, 64, bias=False),
    "tanh": nn.Tanh,
    "identity": nn.Identity,
    "norm": lambda: nn.LayerNorm(64),
    "two linear": lambda: nn.Sequential(nn.Linear(64, 16), nn.Linear(16, 64)),
}


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("rows", [48, 512])
@pytest.mark.parametrize("depth", [1, 2, 8])
@pytest.mark.parametrize("kind", LIGHT)
def test_blocks_that_save_little_stay_within_the_least_budget(
    kind: str, depth: int, rows: int, requires_grad: bool
) -> None:
    blocks, x = [LIGHT[kind]() for _ in range(depth)], torch.randn(rows, 128, requires_grad=requires_grad)
    for options in ({}, {"split_dim": None, "coupling": "momentum"}, {"coupling": "leapfrog"}):
        options["split_dim"] = options.get("split_dim", 1)
        x_in = x if options["split_dim"] else x.detach()[:, :64].clone().requires_grad_(requires_grad)
        first = revlib.ReversibleSequential(*blocks, memory_budget=1.0, **options)
        if not first(x_in).requires_grad:
            continue
        assert first.plan is not None
        stack = revlib.ReversibleSequential(*blocks, memory_budget=first.plan.minimum, **options)
        stack(x_in).sum().backward()  # measures
        x_in.grad = torch.zeros_like(x_in)
        assert stack.plan is not None and peak(stack, x_in)[0] <= stack.plan.limit, options


class CrossAttends(nn.Module):
    """Its argument is as large as a stream, and gets a gradient from each block."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.query(x), self.key(memory), memory)


@pytest.mark.parametrize("depth", [1, 6])
@pytest.mark.parametrize("leaf", [True, False])
def test_gradients_of_arguments_are_counted(depth: int, leaf: bool) -> None:
    blocks = [CrossAttends() for _ in range(depth)]
    x, memory = torch.randn(8, 32, 32), torch.randn(8, 64, 16, requires_grad=True)
    for fraction in (0.0, 0.5, 1.0):
        first = revlib.ReversibleSequential(*blocks, split_dim=2, memory_budget=1.0)
        first(x, memory)
        assert first.plan is not None
        budget = int(first.plan.minimum + fraction * (first.plan.plain - first.plan.minimum))
        stack = revlib.ReversibleSequential(*blocks, split_dim=2, memory_budget=budget)
        stack(x, memory).sum().backward()
        for t in (memory, *stack.parameters()):
            t.grad = torch.zeros_like(t)
        given = memory if leaf else memory * 1
        with revlib.MemoryMeter() as meter:
            y = stack(x, given)
            y.backward(torch.ones_like(y))
        assert stack.plan is not None and meter.peak <= stack.plan.limit


def test_frozen_first_blocks_are_counted() -> None:
    blocks = [mlp(16).requires_grad_(k > 2) for k in range(6)]
    x = torch.randn(256, 32)
    first = revlib.ReversibleSequential(*blocks, memory_budget=1.0)
    first(x)
    assert first.plan is not None
    for fraction in (0, 0.3, 0.7):
        budget = int(first.plan.minimum + fraction * (first.plan.plain - first.plan.minimum))
        stack = revlib.ReversibleSequential(*blocks, memory_budget=budget)
        stack(x).sum().backward()
        assert peak(stack, x)[0] <= budget


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_an_input_without_grad_that_is_rounded_is_counted(depth: int) -> None:
    """The caller holds the input, and the stack what it rounds of it."""
    blocks = [nn.Sequential(nn.Tanh(), nn.Linear(16, 16)).double() for _ in range(depth)]
    x = torch.randn(256, 32, dtype=torch.float64)
    first = revlib.ReversibleSequential(*blocks, memory_budget=1.0, grid_bits=12)
    first(x)
    assert first.plan is not None
    for budget in (first.plan.minimum, first.plan.plain):
        stack = revlib.ReversibleSequential(*blocks, memory_budget=budget, grid_bits=12)
        stack(x).sum().backward()
        assert peak(stack, x)[0] <= budget


def test_blocks_with_sparse_gradients() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(50, 8, sparse=True), nn.Linear(8, 8)

        def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
            return self.linear(x + self.embedding(tokens))

    stack = revlib.ReversibleSequential(*[Adds() for _ in range(4)], memory_budget=1.0)
    stack(torch.randn(4096, 16), torch.arange(4096) % 50).sum().backward()
    assert all(block.embedding.weight.grad.is_sparse for block in stack)
