"""Numbers among a block's attributes, which its calls change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.nn.state.twins import TREATMENTS, sample, twins


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
