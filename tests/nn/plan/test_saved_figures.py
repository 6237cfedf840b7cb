"""Figures of a budget as plain data, from which the same plans follow in another process."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from lightning_revlib.strategies.base import make_budget, save_memory_plan, swap_module
from tests.nn.plan.workloads import Counted, counted, measured, mlp


def test_figures_that_fit_no_budget_are_not_saved() -> None:
    stack = revlib.ReversibleSequential(*[mlp(16) for _ in range(4)], memory_budget=100)
    with pytest.raises(ValueError, match="memory_budget=100"):
        stack(torch.randn(8, 32))
    assert stack.budget is not None and stack.budget.state_dict() == {}


def test_stacks_built_as_reversible_have_figures_by_path_in_a_checkpoint() -> None:
    net = nn.Sequential(*[revlib.ReversibleSequential(mlp(8), mlp(8), memory_budget="1MiB") for _ in range(2)])
    revlib.swap(net)
    net(torch.randn(4, 16, requires_grad=True)).sum().backward()
    saved: dict[str, Any] = {}
    save_memory_plan(saved, None, net)
    assert list(saved["memory_figures"]) == ["0", "1"]


def net(*hidden: int, budget: Any = None) -> nn.Module:
    torch.manual_seed(0)
    stacks = [revlib.ReversibleSequential(*[counted(16, h) for _ in range(4)]) for h in hidden]
    model = nn.Sequential(*stacks)
    swap_module(model, None, budget)
    return model


def are_measured(model: Any, x: Tensor) -> list[bool]:
    """Run a forward, and return of each stack whether it was measured."""
    before = [sum(Counted.calls[id(block)] for block in stack) for stack in model]
    model(x)
    return [
        sum(Counted.calls[id(block)] for block in stack) - count > len(stack)
        for stack, count in zip(model, before, strict=True)
    ]


@pytest.mark.parametrize(
    ("change", "expected"), [("none", [False, False]), ("a module", [False, True]), ("the input", [True, True])]
)
def test_figures_go_through_a_checkpoint(change: str, expected: list[bool]) -> None:
    model, file = net(64, 64, budget=make_budget(0.6)), io.BytesIO()
    for rows in (32, 64):
        model(torch.randn(rows, 32))
    torch.save(model[0].budget.state_dict(), file)  # type: ignore[union-attr, operator]
    file.seek(0)
    again = net(64, 64, budget=make_budget(0.6))
    again[0].budget.load_state_dict(torch.load(file, weights_only=True))  # type: ignore[union-attr, operator]
    if change == "a module":
        again[1][0][0].eps = 1e-3  # type: ignore[index, union-attr]
    assert are_measured(again, torch.randn(128 if change == "the input" else 50, 32)) == expected
    assert change != "none" or again[0].plan == model[0].plan


class Applies(Counted):
    def __init__(self, does: Any) -> None:
        super().__init__(nn.Linear(16, 16))
        self.does = does


class Method:
    def __init__(self, count: int) -> None:
        self.count = count

    def of(self, x: Tensor) -> Tensor:
        return x * self.count


def test_figures_do_not_depend_on_addresses() -> None:
    """A stack that is built anew in the same way takes them; one with another number somewhere does not."""

    def stack_of(count: int) -> Any:
        does = [Method(count), {"what": [torch.relu, lambda x: x]}, {"a", "b"}, object(), (torch.relu, Method)]
        blocks = map(Applies, does)
        kept.append(
            revlib.ReversibleSequential(
                *blocks, coupling_forward=torch.add, coupling_inverse=torch.sub, memory_budget=1.0
            )
        )
        return kept[-1]

    kept: list[Any] = []
    first, same, other = stack_of(1), stack_of(1), stack_of(2)
    x = torch.randn(8, 32)
    first(x)
    for stack in (same, other):
        stack.budget.load_state_dict(first.budget.state_dict())
        assert (measured(partial(stack, x), stack) > 0) == (stack is other)


def test_a_budget_that_goes_on_with_other_stacks() -> None:
    def fit(model: nn.Module, budget: Any) -> tuple[Any, list[bool]]:
        """Run two steps; return the plan, and of each stack whether it was measured."""
        swap_module(model, None, budget)
        found = are_measured(model, torch.randn(32, 32, requires_grad=True))
        assert not any(are_measured(model, torch.randn(32, 32, requires_grad=True)))
        return budget.plan, found

    first, other, budget = net(16, 16), net(16, 64), make_budget("100KB")
    assert fit(first, budget) == fit(first, make_budget("100KB"))
    assert budget is not None
    for model, expected in (
        (first, [False, False]),
        (net(16, 16), [False, False]),
        (other, [False, True]),
        (net(16), [False]),
    ):
        plan, was_measured = fit(model, budget)
        assert was_measured == expected
        assert plan == fit(model, make_budget("100KB"))[0]
    assert budget.plan is not None and set(budget.plan.treatments) == {"0"}
    fit(first, budget)
    resumed = make_budget("100KB")
    resumed.load_state_dict(budget.state_dict())  # type: ignore[union-attr]
    plan, was_measured = fit(other, resumed)
    assert was_measured == [False, True] and plan == fit(other, make_budget("100KB"))[0]
