"""Drift: how far the input that backward rebuilt is from the input, and what is done about it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
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


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("frozen", [1, 3])
def test_first_blocks_that_are_frozen_and_never_rebuilt(frozen: int, chunks: int) -> None:
    stack = revlib.ReversibleSequential(
        *blocks(), coupling_forward=torch.add, coupling_inverse=_wrong, chunks=chunks, on_drift="raise"
    )
    stack[:frozen].requires_grad_(False)
    loss = stack(torch.randn(64, 8)).sum()
    with pytest.raises(RuntimeError, match="backward rebuilt the input with a relative error of"):
        loss.backward()


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


def _spoiled(place: int, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a coupling's inverse that adds to one element of what it returns."""

    def inverse(out: Tensor, f: Tensor) -> Tensor:
        a = out - f
        a.view(-1)[place] += change(a)
        return a

    return inverse


def _drift(x: Tensor, inverse: Any, **options: Any) -> float:
    stack = revlib.ReversibleSequential(nn.Tanh(), coupling_forward=torch.add, coupling_inverse=inverse, **options)
    stack(x.requires_grad_()).sum().backward()
    assert stack.drift is not None
    return stack.drift


@pytest.mark.parametrize("shape", [(64, 8), (1, 6), (3, 10, 7), (1000, 258)])
def test_a_change_of_any_element_is_seen(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    count = x.numel() // 2
    places = range(count) if count < 300 else torch.randint(0, count, (50,)).tolist()
    for place in places:
        drift = _drift(x, _spoiled(place, lambda a: 0.009 * x.detach().norm()))
        assert drift == pytest.approx(0.009, rel=0.5)


def test_a_change_of_one_element_in_ten_million_is_told() -> None:
    x = torch.randn(2, 10_000_000)
    for size in (x[0, 777].abs(), 1e-3 * x.norm()):
        drift = _drift(x, _spoiled(777, lambda a, size=size: size), split_dim=0)
        assert drift == pytest.approx((size / x.norm()).item(), rel=0.1)


ERRORS = {
    "everywhere the same": lambda x: torch.ones_like(x),
    "of a bias": lambda x: torch.randn(x.shape[-1]).expand_as(x),
    "of a sample": lambda x: torch.randn(len(x), 1).expand_as(x),
    "of one channel": lambda x: (torch.arange(x.shape[-1]) == 3).to(x).expand_as(x),
    "alternating": lambda x: (1 - 2.0 * (torch.arange(x.shape[-1]) % 2)).expand_as(x),
    "random": torch.randn_like,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("error", ERRORS)
def test_drift_is_the_error_in_the_2_norm_whatever_the_error(error: str, dtype: torch.dtype) -> None:
    for shape in ((64, 32), (256, 128), (1024, 384)):
        x = torch.randn(shape)
        wrong = ERRORS[error](x[:, : shape[1] // 2])
        wrong = (wrong * 0.05 * x.norm() / wrong.norm()).to(dtype)
        drift = _drift(x.to(dtype), lambda out, f, wrong=wrong: out - f + wrong, stream_dtype=dtype, drift_tolerance=1)
        assert drift == pytest.approx(0.05, rel=0.4), shape


def test_drift_is_measured_in_any_layout() -> None:
    last, block = torch.channels_last, nn.Conv2d(4, 4, 3, padding=1)
    x = torch.randn(4, 8, 6, 6).to(memory_format=last)
    turned = {"coupling_forward": torch.add, "coupling_inverse": lambda out, f: (out - f).contiguous()}
    for options in ({"grid_bits": 12}, {}, turned):
        for start in (x, x.clone().requires_grad_(), x[:1], torch.randn(4, 8, 6, 6)):
            stack = revlib.ReversibleSequential(block, block, **options).to(memory_format=last)
            stack(start).sum().backward()
            assert stack.drift is not None and stack.drift <= (0 if "grid_bits" in options else 1e-6)


class Draws(nn.Module):
    """Draws a random number of Python's in those of its calls that are named."""

    def __init__(self, calls: set[int]) -> None:
        super().__init__()
        self.linear, self.calls, self.count = nn.Linear(4, 4), calls, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.count[0] += 1
        return self.linear(x).tanh() * (1 + (self.count[0] in self.calls) * random.random())


@pytest.mark.parametrize("forward", [1, 2, 3])
def test_drift_of_one_forward_of_three(forward: int) -> None:
    stack, x = revlib.ReversibleSequential(*blocks(3), Draws({forward})), torch.randn(8, 8)
    with pytest.warns(UserWarning, match="backward rebuilt the input with a relative error of"):
        torch.stack([stack(x).sum() for _ in range(3)]).sum().backward()
    assert stack.drift is not None and stack.drift > 1e-2
