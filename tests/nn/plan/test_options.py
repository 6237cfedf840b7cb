"""How a budget is given, how a plan is printed, and what is wrong with either."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import lightning_revlib as revlib
from tests.nn.plan.workloads import mlp


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-5, ValueError), (1.5, ValueError), (0.0, ValueError), ("2 GiBs", ValueError), ("", ValueError),
     ("0", ValueError), ("0.5", ValueError), ("9" * 400, ValueError),
     ("1.2.3MB", ValueError), (True, TypeError), ([1], TypeError), (float("nan"), ValueError)],
)  # fmt: skip
def test_bad_budgets_are_named(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="memory_budget="):
        revlib.ReversibleSequential(nn.Identity(), memory_budget=value)


def test_what_cannot_be_planned_is_named() -> None:
    stack = revlib.ReversibleSequential(mlp(16), mlp(16), memory_budget=100)
    for _ in range(2):
        with pytest.raises(ValueError, match="memory_budget=100 is 100 B, and the reversible stacks need at least"):
            stack(torch.randn(64, 32))
    with pytest.raises(ValueError, match="say the same; pass one of them"):
        revlib.ReversibleSequential(mlp(16), memory_budget=0.5, store_last=1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            revlib.ReversibleSequential(mlp(16), memory_budget="auto")(torch.randn(4, 32))


def test_plan_is_deterministic_printed_and_survives_pickling(caplog: pytest.LogCaptureFixture) -> None:
    blocks, x = [mlp(16) for _ in range(6)], torch.randn(64, 32)
    with caplog.at_level(logging.INFO, "lightning_revlib"):
        plans = []
        for _ in range(2):
            stack = revlib.ReversibleSequential(*blocks, memory_budget="100 kB")
            stack(x)
            plans.append(stack.plan)
    assert plans[0] == plans[1] and "memory plan:" in caplog.text and "of 97.7 KiB" in str(plans[0])
    assert pickle.loads(pickle.dumps(stack)).plan == stack.plan


@pytest.mark.parametrize(
    ("value", "limit"),
    [(1 << 20, 1 << 20), ("2GiB", 2 << 30), ("1.5 MB", 1_500_000), ("100000", 100_000), (0.9, 0.9), (1.0, 1.0)],
)
def test_budgets_are_read(value: Any, limit: Any) -> None:
    stack = revlib.ReversibleSequential(*[mlp(16) for _ in range(4)], memory_budget=value)
    stack(torch.randn(32, 32, requires_grad=True))
    assert stack.plan is not None
    assert stack.plan.limit == (int(limit * stack.plan.plain) if isinstance(limit, float) else limit)
