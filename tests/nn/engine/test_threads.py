"""Random numbers are the process's: what another thread draws while a block runs is warned of."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib


class Disturbed(nn.Module):
    """A linear layer with dropout, between which another thread draws in the calls that a test names."""

    def __init__(self, p: float, calls: set[int]) -> None:
        super().__init__()
        self.layer, self.p, self.calls, self.seen = nn.Linear(4, 4), p, calls, [0]

    def forward(self, x: Tensor) -> Tensor:
        self.seen[0] += 1  # a list, which a second run does not put back
        if self.seen[0] in self.calls:
            thread = threading.Thread(target=torch.rand, args=(1,))
            thread.start()
            thread.join()
        x = nn.functional.dropout(self.layer(x), self.p) if self.p else self.layer(x)
        return x + torch.rand_like(x) * 0 if self.p else x


def gradients(cls: Any, block: nn.Module, x: Tensor, **options: Any) -> Any:
    torch.manual_seed(1)
    return torch.autograd.grad(cls(block, **options)(x).square().sum(), [x, *block.parameters()])


@pytest.mark.parametrize("calls", [{1}, {2}, {1, 2}, set()], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_draws_of_another_thread(p: float, calls: set[int]) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    block = Disturbed(p, calls)
    told = p and calls in ({1}, {2})
    with (
        pytest.warns(UserWarning, match="Disturbed: other random numbers were drawn .* by another thread")
        if told
        else nullcontext()
    ):
        found = gradients(revlib.ReversibleSequential, block, x)
    if told:
        return
    block.seen[0] = 0
    torch.testing.assert_close(found, gradients(revlib.CoupledSequential, block, x))


def stack_with_dropout() -> revlib.ReversibleSequential:
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Tanh()) for _ in range(6)]
    return revlib.ReversibleSequential(*blocks).double()


def in_threads(train: Callable[[revlib.ReversibleSequential], None]) -> None:
    threads = [threading.Thread(target=train, args=(stack_with_dropout(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_two_trainings_at_once() -> None:
    drifts: list[Any] = []

    def train(stack: revlib.ReversibleSequential) -> None:
        for _ in range(20):
            stack(torch.randn(16, 128, dtype=torch.float64)).square().sum().backward()
            drifts.append(stack.drift)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        in_threads(train)
    told = [warning for warning in told if "by another thread" in str(warning.message)]
    assert len(drifts) == 40 and sum(drift > 1e-10 for drift in drifts) <= len(told)


def test_trainings_that_take_turns() -> None:
    lock, drifts = threading.Lock(), []

    def train(stack: revlib.ReversibleSequential) -> None:
        for _ in range(10):
            with lock:
                stack(torch.randn(16, 128, dtype=torch.float64)).square().sum().backward()
                drifts.append(stack.drift)

    in_threads(train)
    assert len(drifts) == 20 and all(drift is not None and drift < 1e-10 for drift in drifts)


class Meets(nn.Module):
    """A batch norm of which the second call waits while another thread calls the block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.calls, self.other = nn.BatchNorm1d(4), [0], threading.Thread()

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        if self.calls[0] == 2:
            self.other.start()
            self.other.join()
        y: Tensor = self.norm(x)
        return y


def test_a_norm_that_two_threads_share_is_told() -> None:
    block, x = Meets(), torch.randn(6, 8)
    stack = revlib.ReversibleSequential(block)
    told: list[Any] = []

    def call() -> None:
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            stack(x)
        told.extend(shown)

    block.other = threading.Thread(target=call)
    stack(x).sum().backward()
    assert any("runs in two threads at once" in str(each.message) for each in told)
    assert block.calls == [3]


def test_one_retained_graph_differentiated_by_several_threads() -> None:
    stack = revlib.ReversibleSequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(12)]).double()
    x = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    y = stack(x).square().sum()
    leaves = [x, *stack.parameters()]
    expected = torch.autograd.grad(y, leaves, retain_graph=True)
    found: list[Any] = []

    def differentiate() -> None:
        for _ in range(20):
            found.append(torch.autograd.grad(y, leaves, retain_graph=True))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=differentiate) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(found) == 80
    assert all(torch.allclose(ours, g, rtol=1e-9) for grads in found for ours, g in zip(grads, expected, strict=True))
