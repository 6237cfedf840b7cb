"""Gradients and buffers under a plan are those of ordinary autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

import lightning_revlib as revlib
from tests.nn.plan.workloads import STACKS


def planned(stack: revlib.ReversibleSequential, x: Tensor) -> Any:
    state, buffers = torch.get_rng_state(), [b.clone() for b in stack.buffers()]
    stack(x)
    torch.set_rng_state(state)
    for b, start in zip(stack.buffers(), buffers, strict=True):
        b.copy_(start)
    assert stack.plan is not None
    return stack.plan


def gradients(stack: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(stack(x).square().sum(), [x, *stack.parameters()]))


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.8])
def test_gradients_and_buffers_are_those_of_autograd(kind: str, fraction: float) -> None:
    make, shape, options = STACKS[kind]
    torch.manual_seed(0)
    blocks, x = make(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    plan = planned(revlib.ReversibleSequential(*blocks, memory_budget=1.0, **options).double(), x)
    budget = int(plan.minimum + fraction * (plan.plain - plan.minimum))
    plain = revlib.CoupledSequential(*blocks, **options).double()
    buffers = [b.clone() for b in plain.buffers()]
    expected = [gradients(plain, x) for _ in range(2)]
    after = [b.clone() for b in plain.buffers()]
    for b, start in zip(plain.buffers(), buffers, strict=True):
        b.copy_(start)
    stack = revlib.ReversibleSequential(*blocks, memory_budget=budget, **options)
    for step in expected:  # the first measures, the second follows the plan
        for ours, theirs in zip(gradients(stack, x), step, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(stack.buffers(), after, strict=True):
        torch.testing.assert_close(ours, theirs)


class Conditioned(nn.Module):
    """Is given the output of an embedding, which all blocks may share, and a list to add to."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed, self.linear = embed, nn.Linear(4, 4)

    def forward(self, x: Tensor, condition: Tensor, seen: list[Tensor]) -> Tensor:
        seen.append(x.detach().mean())
        return torch.tanh(self.linear(x) + self.embed(condition)) * condition


def test_measuring_leaves_arguments_and_their_graphs() -> None:
    results = []
    for budget in (None, 0.8):
        torch.manual_seed(0)
        embed = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        blocks = [Conditioned(embed) for _ in range(6)]
        stack = revlib.ReversibleSequential(*blocks, memory_budget=budget).double()
        x, seen = torch.randn(5, 8, dtype=torch.float64), []  # type: ignore[var-annotated]
        for _ in range(2):  # the first step measures
            stack(x, embed(x[:, 4:]), seen).square().sum().backward()
        results.append([p.grad for p in stack.parameters()])
        assert len(seen) == 12
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_measuring_leaves_cached_weights() -> None:
    blocks = [nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(4)]
    stack = revlib.ReversibleSequential(*blocks, memory_budget="1MiB").double()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    with nn.utils.parametrize.cached():
        (grad,) = torch.autograd.grad(stack(x).square().sum(), x)
    (expected,) = torch.autograd.grad(revlib.CoupledSequential(*blocks)(x).square().sum(), x)
    torch.testing.assert_close(grad, expected)


def test_lazy_modules_are_measured_when_they_have_their_parameters() -> None:
    stack = revlib.ReversibleSequential(nn.LazyLinear(4), nn.LazyLinear(4), memory_budget="1MiB")
    x = torch.randn(5, 8)
    for _ in range(2):
        stack(x).sum().backward()
    assert stack.plan is not None


class Codebook(nn.Module):
    """Moves a parameter without gradient in each forward in training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.book = nn.Linear(4, 4), nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.book.mul_(0.5).add_(x.detach().mean(0))
        return self.linear(x * self.book).tanh()  # type: ignore[no-any-return]


def test_measuring_leaves_what_a_forward_moves() -> None:
    x, results = torch.randn(5, 8), []
    for how in ("plain", "budget", "swap", "report", "memory"):
        torch.manual_seed(0)
        blocks = [Codebook() for _ in range(3)]
        stack: Any = revlib.CoupledSequential(*blocks)
        if how == "budget":
            stack = revlib.ReversibleSequential(*blocks, memory_budget="1MiB")
        elif how == "swap":
            revlib.swap(stack, inputs=x)
        elif how != "plain":
            revlib.report(stack, x) if how == "report" else revlib.memory(stack, x, torch.optim.SGD)
        stack(x)
        results.append([p.detach() for p in stack.parameters()])
    for each in results[1:]:
        torch.testing.assert_close(each, results[0])


def test_measuring_calls_no_hooks_of_parameters() -> None:
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3)]
    stack = revlib.ReversibleSequential(*blocks, memory_budget="1MiB")
    single: list[Tensor] = []
    several: list[int] = []
    for p in stack.parameters():
        p.register_hook(single.append)
    register_multi_grad_hook(list(stack.parameters()), lambda grads: several.append(len(grads)))
    for steps in (1, 2):
        stack(torch.randn(4, 16)).sum().backward()
        assert len(single) == 12 * steps and several == [12] * steps


def test_blocks_that_read_attributes_of_their_parameters() -> None:
    class Marked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.weight.factor  # type: ignore[no-any-return, attr-defined]

    blocks = [Marked(8, 8) for _ in range(3)]
    for block in blocks:
        block.weight.factor = 0.5  # type: ignore[attr-defined]
    stack = revlib.ReversibleSequential(*blocks, memory_budget="1MiB")
    stack(torch.randn(4, 16)).sum().backward()
    assert stack.plan is not None
