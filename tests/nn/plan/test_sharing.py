"""One budget for several stacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_revlib as revlib
from lightning_revlib.strategies.base import make_budget, swap_module
from tests.nn.plan.workloads import mlp, peak


def test_stacks_that_never_run_and_slices() -> None:
    model = nn.ModuleList([revlib.ReversibleSequential(*[mlp(16) for _ in range(4)]) for _ in range(2)])
    x = torch.randn(64, 32, requires_grad=True)
    for value in (0.5, 0.9):
        swap_module(model, None, make_budget(value))
        for _ in range(2):
            model[0](x)
        assert model[0].plan.limit == int(value * model[0].plan.plain) and set(model[0].plan.treatments) == {"0"}
    model[0][:2](x)
    assert len(model[0].plan.treatments["0"]) == 4
    model[0](x)
    swap_module(model, None, None)
    assert model[0].plan is None


def test_several_stacks_share_a_budget() -> None:
    model = nn.Sequential(*[revlib.ReversibleSequential(*[mlp(16) for _ in range(4)]) for _ in range(2)])
    x = torch.randn(64, 32, requires_grad=True)
    least, _ = peak(model, x)
    plain, _ = peak(nn.Sequential(*[revlib.CoupledSequential(*stack) for stack in model]), x)  # type: ignore[misc]
    budget = (least + plain) // 2
    swap_module(model, None, make_budget(budget))
    model(x)
    assert peak(model, x)[0] <= budget
    assert model[0].plan is model[1].plan and set(model[0].plan.treatments) == {"0", "1"}


def test_stacks_that_share_a_budget_and_batches_that_alternate() -> None:
    model = nn.Sequential(*[revlib.ReversibleSequential(*[mlp(16) for _ in range(4)]) for _ in range(2)])
    x, plans = torch.randn(256, 32, requires_grad=True), []
    swap_module(model, None, make_budget("600KiB"))
    first, second = model
    for rows in (16, 16, 256, 256, 256, 16, 256, 256, 16, 256):
        assert peak(model, x[:rows])[0] <= 600 << 10, rows
        assert first.plan is second.plan and first.plan.peak <= 600 << 10
        plans.append(id(first.plan))
    assert len(set(plans)) == 2
    planned = first.plan.treatments["0"]
    first(x[:256])  # together with 256 rows in the second stack, which are 16 now
    second(x[:16])
    assert first.plan.treatments["0"] == planned != ("store",) * 4 == first.plan.treatments["1"]
    first(x[:16])  # and the other way round
    second(x[:256])
    assert first.plan.treatments["0"] == ("store",) * 4 != first.plan.treatments["1"]
    assert first.plan.peak <= 600 << 10 < first.plan.plain


def test_a_smaller_batch_after_one_that_fits_no_budget() -> None:
    model = nn.Sequential(*[revlib.ReversibleSequential(*[mlp(16) for _ in range(4)]) for _ in range(2)])
    x = torch.randn(512, 32)
    least, _ = peak(model, x[:256])
    swap_module(model, None, make_budget(least + 4096))
    for _ in range(2):
        with pytest.raises(ValueError, match="take a smaller batch"):
            model(x)
    model(x[:64])
    assert peak(model, x[:64])[0] <= least + 4096 and set(model[0].plan.treatments) == {"0", "1"}  # type: ignore[union-attr]
