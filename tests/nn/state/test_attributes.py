"""Numbers among a block's attributes, which its calls change."""

from __future__ import annotations

import gc
import weakref
from enum import Enum
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.nn.state.twins import TREATMENTS, sample, twins


class Kind(Enum):
    ONE, TWO = 1, 2


class Schedule(nn.Module):
    """Counts its calls, within and behind another module, and depends on the number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.rate = 0, 0.5
        self.inner = nn.Tanh()
        self.inner.calls = 0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.rate, self.inner.calls = self.calls + 1, self.rate * 0.9, self.inner.calls + 2  # type: ignore[assignment, operator]
        return self.inner(x * self.rate * self.inner.calls) + x / self.calls


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_blocks_that_count_their_calls(treatment: Any) -> None:
    stack, plain = twins(Schedule, treatment)
    x = sample()
    for calls in (1, 2, 3):
        (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
        assert torch.allclose(torch.autograd.grad(stack(x).square().sum(), x)[0], expected, rtol=1e-9)
        assert all((m.calls, m.inner.calls) == (calls, 2 * calls) for m in stack)  # once a step, as in plain
    expected = torch.autograd.grad(plain(x).sum() * plain(x).sum(), x)[0]  # two forwards, then backward
    assert torch.allclose(torch.autograd.grad(stack(x).sum() * stack(x).sum(), x)[0], expected, rtol=1e-9)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_what_is_learnt_in_evaluation_is_learnt_anew_in_training(treatment: Any) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(4, 4, dtype=torch.float64), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            return self.linear(x).tanh() * (1 + self.calls)  # type: ignore[no-any-return]

    stack, plain = twins(Counts, treatment)
    x = sample()
    for training in (False, True, True):
        (expected,) = torch.autograd.grad(plain.train(training)(x).square().sum(), x)
        (grad,) = torch.autograd.grad(stack.train(training)(x).square().sum(), x)
        assert torch.allclose(grad, expected, rtol=1e-12)
        assert [b.calls for b in stack] == [b.calls for b in plain]  # type: ignore[attr-defined]


class Tempered(nn.Module):
    """Depends on a number of its own, and on one of a torch layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout, self.temperature = nn.Linear(4, 4).double(), nn.Dropout(0.1), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.dropout(x)) * self.temperature)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_settings_that_their_owner_changes_before_backward(treatment: Any) -> None:
    x, results = sample(), []
    for model in twins(Tempered, treatment):
        torch.manual_seed(1)
        outputs = []
        for temperature in (1.0, 3.0):  # two forwards by other settings, and yet others for the next step
            for block in model:  # type: ignore[attr-defined]
                block.temperature, block.dropout.p = temperature, 0.2 * temperature
            outputs.append(model(x).square().sum())
        for block in model:  # type: ignore[attr-defined]
            block.temperature, block.dropout.p, block.is_late = 9.0, 0.9, True
        results.append(torch.autograd.grad(sum(outputs), [x, *model.parameters()]))  # type: ignore[arg-type]
        assert all((b.temperature, b.dropout.p, b.is_late) == (9.0, 0.9, True) for b in model)  # type: ignore[attr-defined]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_recurrent_state_in_a_tuple(treatment: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.state = nn.LSTM(8, 8).double(), None

        def forward(self, x: Tensor) -> Tensor:
            out, self.state = self.lstm(x, self.state)
            return out  # type: ignore[no-any-return]

    x, results = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True), []
    for model in twins(Recurrent, treatment):
        for block in model:  # type: ignore[attr-defined]
            block.state = None
        steps = [
            torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]) for _ in range(3) if detach(model)
        ]
        results.append([*[g for step in steps for g in step], *[t for b in model for t in b.state]])  # type: ignore[attr-defined]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def detach(model: Any) -> bool:
    """Cut the states off from the step before, as truncated backpropagation through time does."""
    for block in model:
        block.state = None if block.state is None else tuple(t.detach() for t in block.state)
    return True


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_objects_and_numbers_of_numpy_that_their_owner_replaces(treatment: Any) -> None:
    numpy = pytest.importorskip("numpy")

    class Logs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.log, self.rate = nn.Linear(4, 4).double(), list[int](), numpy.float64(0.5)

        def forward(self, x: Tensor) -> Tensor:
            if self.log is not None:
                self.log.append(1)
            return self.linear(x).tanh() * float(self.rate)  # type: ignore[no-any-return]

    x, grads = sample(), []
    for model in twins(Logs, treatment):
        y = model(x).square().sum()
        for block in model:  # type: ignore[attr-defined]
            block.log, block.rate = None, numpy.float64(0.25)
        grads.append(torch.autograd.grad(y, x)[0])
        assert all(block.log is None and block.rate == 0.25 for block in model)  # type: ignore[attr-defined]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_the_training_flag_of_a_scripted_module(treatment: Any) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4).double(), torch.jit.script(nn.Dropout(0.5)))

    x, grads = sample(), []
    for model in twins(make, treatment):
        torch.manual_seed(1)
        y = model(x).square().sum()
        model.eval()
        grads.append(torch.autograd.grad(y, x)[0])
        assert not any(m.training for m in model.modules())
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


class Lists(nn.Module):
    """Keeps its further losses in a list or dict, which each call sets anew, and its last output in another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.losses: list[Tensor] = []
        self.last: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).tanh()
        if self.last:
            y = y + self.last["y"]
        self.last = {"y": y.detach()}
        self.losses = [y.square().mean(), y.sum()]  # the second one saves nothing
        return y


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_lists_and_dicts_that_each_call_sets_anew(treatment: Any) -> None:
    found, x = [], sample()
    for stack in twins(Lists, treatment):
        for _ in range(2):
            y = stack(x)
        parameters = [p for block in stack for p in block.parameters()]
        grads = torch.autograd.grad(y.square().sum(), [x, *parameters], retain_graph=True)
        for number in (0, 1):
            loss = torch.stack([block.losses[number] for block in stack]).sum()
            grads += torch.autograd.grad(loss, [x, *parameters], retain_graph=True)
        found.append(grads)
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9)


def test_a_loss_in_an_object_of_a_blocks() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.log = nn.Linear(4, 4), [torch.zeros(())]

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x).tanh()
            self.log[0] = y.square().mean()
            return y

    stack = revlib.ReversibleSequential(Keeps(), Keeps())
    stack(torch.randn(3, 8)).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward reached the graph of a block's second run, which is freed"):
        sum(block.log[0] for block in stack).backward()


class Logits:
    """An object that is no tensor, tuple, list or dict, and has a tensor with its graph."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_objects_in_a_list_that_each_call_sets_anew_are_freed(treatment: Any) -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.routers: list[Logits] = []

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x).tanh()
            self.routers = [Logits(y)]
            return y

    stack, met = revlib.ReversibleSequential(Routed(), Routed(), treatments=[treatment] * 2), []
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            stack(torch.randn(3, 8)).sum().backward()
            met.append(weakref.ref(stack[0].routers[0]))
        assert [each() is None for each in met] == [True, True, True, False]
    finally:
        gc.enable()


class Builds(nn.Module):
    """Makes its layer in its first call, known by a flag or by the layer's absence."""

    def __init__(self, by_flag: bool) -> None:
        super().__init__()
        self.by_flag, self.is_built, self.linear = by_flag, False, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_built if self.by_flag else self.linear is None:
            self.linear, self.is_built = nn.Linear(4, 4, dtype=x.dtype), True
        return nn.functional.dropout(self.linear(x)).tanh()  # type: ignore[misc]


@pytest.mark.parametrize("by_flag", [True, False])
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_layers_that_a_first_call_makes(treatment: Any, by_flag: bool) -> None:
    found, x = [], sample()
    for stack in twins(lambda: Builds(by_flag), treatment):
        torch.manual_seed(0)
        grads: list[Any] = []
        for _ in range(2):
            y = stack(x)
            layers = [block.linear for block in stack]
            y.square().sum().backward()
            assert [block.linear for block in stack] == layers
            grads += [p.grad.clone() for layer in layers for p in layer.parameters()]
        found.append(grads)
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize(
    "values",
    [
        (1 + 0j, 2 + 0j),
        (b"1", b"2"),
        (range(1), range(2)),
        (Kind.ONE, Kind.TWO),
        (numpy.float32(1), numpy.float32(2)),
        (numpy.bool_(True), numpy.bool_(False)),
        (Fraction(1, 2), Fraction(1, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_plain_values_of_further_types(treatment: Any, values: tuple[Any, Any]) -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kind = values[0]

        def forward(self, x: Tensor) -> Tensor:
            y = x.tanh() if self.kind == values[0] else x.sin()
            self.kind = values[1] if self.kind == values[0] else values[0]
            return y * (1.0 if self.kind == values[0] else 3.0)

    x, found = sample(), []
    for stack in twins(Turns, treatment):
        found.append(torch.autograd.grad(stack(x).square().sum(), x)[0])
        assert all(block.kind == values[1] for block in stack)  # type: ignore[attr-defined]
    assert torch.allclose(*found, rtol=1e-9)
