from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib


def test_batch_norm_counts_one_update_a_step() -> None:
    stack = revlib.ReversibleSequential(*[nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)) for _ in range(3)])
    stack(torch.randn(8, 8)).sum().backward()
    assert [int(block[0].num_batches_tracked) for block in stack] == [1, 1, 1]  # type: ignore[index, arg-type]


def test_batch_norm_buffers_are_the_same_objects_after_backward() -> None:
    stack = revlib.ReversibleSequential(nn.BatchNorm1d(4))
    before = [id(b) for b in stack.buffers()]
    stack(torch.randn(8, 8, requires_grad=True)).sum().backward()
    assert [id(b) for b in stack.buffers()] == before


def test_a_block_that_draws_nothing_restores_no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = revlib.ReversibleSequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    loss = stack(torch.randn(2, 8)).sum()

    def refuse(state: Tensor) -> None:
        raise AssertionError("the generator's state was set")

    monkeypatch.setattr(torch, "set_rng_state", refuse)
    loss.backward()
    assert stack[0].weight.grad is not None  # type: ignore[union-attr]


def test_default_dtype_is_that_of_the_forward() -> None:
    class MakesTensors(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.full((), 0.5).exp() * x.tanh()

    stack = revlib.ReversibleSequential(MakesTensors(), MakesTensors())
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    torch.set_default_dtype(torch.float64)
    try:
        y = stack(x)
    finally:
        torch.set_default_dtype(torch.float32)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.set_default_dtype(torch.float64)
    try:
        (expected,) = torch.autograd.grad(revlib.CoupledSequential(*stack)(x).sum(), x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(grad, expected, rtol=1e-12)


def test_lazy_modules_materialise_in_the_stack() -> None:
    stack = revlib.ReversibleSequential(nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(4)), nn.LazyLinear(4))
    x = torch.randn(8, 8, requires_grad=True)
    stack(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
