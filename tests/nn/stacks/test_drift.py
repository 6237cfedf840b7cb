"""Drift: how far the input that backward rebuilt is from the input, and what is done about it."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib


def blocks(depth: int = 4, width: int = 4) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]


def _wrong(out: Tensor, f: Tensor) -> Tensor:
    return out - 0.9 * f


def _nan(out: Tensor, f: Tensor) -> Tensor:
    return (out - f) * float("nan")


def test_drift_is_that_of_the_last_backward() -> None:
    stack, x = revlib.ReversibleSequential(*blocks(), coupling={"name": "momentum", "gamma": 0.5}), torch.randn(64, 8)
    assert stack.drift is None
    stack(x).sum().backward()
    assert stack.drift is not None and 0 < stack.drift < 1e-4
    bad = revlib.ReversibleSequential(*blocks(), coupling_forward=torch.add, coupling_inverse=_wrong)
    bad(x).sum().backward()
    assert bad.drift is not None and bad.drift > 1e-2


def test_no_drift_where_nothing_is_rebuilt() -> None:
    x = torch.randn(4, 16)
    stack = revlib.ReversibleSequential(*[nn.Linear(8, 8) for _ in range(3)], memory_budget="1GiB")
    stack(x).sum().backward()
    assert stack.drift is not None  # the first step measures, and undoes all
    stack(x).sum().backward()
    assert "3 store" in str(stack.plan) and stack.drift is None


@pytest.mark.parametrize("on_drift", ["ignore", "warn", "raise"])
def test_on_drift(on_drift: Any) -> None:
    options = {"coupling_forward": torch.add, "coupling_inverse": _wrong, "on_drift": on_drift}
    loss = revlib.ReversibleSequential(*blocks(), **options)(torch.randn(64, 8)).sum()
    message = r"stack: backward rebuilt the input with a relative error of .*, more than drift_tolerance=1\.0e-02"
    if on_drift == "raise":
        with pytest.raises(RuntimeError, match=message):
            loss.backward()
    elif on_drift == "warn":
        with pytest.warns(UserWarning, match=message):
            loss.backward()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss.backward()


@pytest.mark.parametrize("on_drift", ["ignore", "warn_once"])
def test_backward_is_the_same_if_drift_is_ignored(on_drift: Any) -> None:
    ran: list[int] = []
    stack = revlib.ReversibleSequential(
        *[nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 4)) for _ in range(3)],
        on_drift=on_drift,
    )
    for number, block in enumerate(stack):
        block[3].register_forward_hook(lambda *_, number=number: ran.append(number))  # type: ignore[index]
    torch.manual_seed(0)
    x = torch.randn(2, 8, requires_grad=True)
    y = stack(x)
    seed = torch.random.get_rng_state()
    y.sum().backward(retain_graph=True)
    assert ran[:5] == [0, 1, 2, 2, 1] and (stack.drift is None) == (on_drift == "ignore")
    assert torch.equal(torch.random.get_rng_state(), seed)
    first, x.grad = x.grad, None
    y.sum().backward()
    assert first is not None and x.grad is not None and torch.equal(first, x.grad)


def test_by_default_drift_is_looked_at_ever_more_rarely_and_told_once() -> None:
    right = True
    stack = revlib.ReversibleSequential(
        *blocks(), coupling_forward=torch.add, coupling_inverse=lambda out, f: out - f if right else _wrong(out, f)
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(1, 33):
            right = step < 9
            stack(torch.randn(64, 8)).sum().backward()
            assert len(told) == (step >= 16)


def test_a_block_that_is_another_when_it_runs_again_is_told_of() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh() * random.random()

    loss = revlib.ReversibleSequential(Noisy(), Noisy())(torch.randn(64, 8, requires_grad=True)).sum()
    with pytest.warns(UserWarning, match="relative error of .* a block computes something else when it runs again"):
        loss.backward()


def test_a_reconstruction_that_overflows_is_told_of() -> None:
    made = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()) for _ in range(24)]
    stack = revlib.ReversibleSequential(*made, split_dim=None, coupling={"name": "momentum", "gamma": 0.001})
    y = stack(torch.randn(32, 8))
    assert y.isfinite().all()
    with pytest.warns(UserWarning, match="relative error of nan"):
        y.sum().backward()


def test_an_input_of_zeros_has_no_drift_that_is_worth_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        revlib.ReversibleSequential(*blocks())(torch.zeros(64, 8)).sum().backward()


def test_stored_and_checkpointed_blocks_end_the_drift() -> None:
    x, drifts = torch.randn(64, 8), []
    for treatments in (["reversible"] * 12, (["reversible"] * 3 + ["checkpoint"]) * 3):
        torch.manual_seed(1)
        stack = revlib.ReversibleSequential(
            *blocks(12), coupling={"name": "momentum", "gamma": 0.3}, treatments=treatments
        )
        stack(x).sum().backward()
        drifts.append(stack.drift)
    assert drifts[1] < 0.1 * drifts[0]


def test_drift_is_that_of_the_worst_part() -> None:
    options = {"coupling_forward": torch.add, "coupling_inverse": [_wrong], "treatments": ["reversible", "store"] * 2}
    stack = revlib.ReversibleSequential(*blocks(), **{**options, "coupling_forward": [torch.add]})
    x = torch.randn(64, 8)
    stack(x).sum().backward()
    both = stack.drift
    parts = []
    for k in (0, 2):
        part = revlib.ReversibleSequential(stack[k], coupling_forward=torch.add, coupling_inverse=_wrong)
        with torch.no_grad():
            entrance = stack[:k](x) if k else x
        part(entrance).sum().backward()
        parts.append(part.drift)
    assert both == pytest.approx(max(parts), rel=1e-4)


def test_a_drift_that_is_no_number_is_raised() -> None:
    stack = revlib.ReversibleSequential(*blocks(), coupling_forward=torch.add, coupling_inverse=_nan, on_drift="raise")
    loss = stack(torch.randn(64, 8)).sum()
    with pytest.raises(RuntimeError, match="relative error of nan"):
        loss.backward()
