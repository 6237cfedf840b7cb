from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import lightning_revlib as revlib
from lightning_revlib.nn.state.buffers import Buffers


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
    x, stacks = torch.randn(8, 8, requires_grad=True), []
    for cls in (revlib.ReversibleSequential, revlib.CoupledSequential):
        stacks.append(cls(nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(4)), nn.LazyLinear(4)))
        torch.manual_seed(0)
        stacks[-1](x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    for buffer, expected in zip(*[stack.buffers() for stack in stacks], strict=True):
        assert torch.equal(buffer, expected)


def renorm(m: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """Reads its statistics in training, as batch renormalisation does."""
    assert m.running_mean is not None
    out = (x - m.running_mean) * x.std()
    nn.BatchNorm1d.forward(m, x)
    return out


class Renorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return renorm(self, x)


@pytest.mark.parametrize("execution", ["reversible", "checkpoint"])
def test_a_batch_norm_that_reads_its_statistics_in_training_meets_them_again(execution: str) -> None:
    blocks = [nn.Sequential(Renorm(4, momentum=0.5), nn.Linear(4, 4)).double() for _ in range(3)]
    x = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(revlib.CoupledSequential(*copy.deepcopy(blocks))(x).square().sum(), x)[0]
    stack = revlib.ReversibleSequential(*blocks, treatments=[execution] * 3)  # type: ignore[list-item]
    grad = torch.autograd.grad(stack(x).square().sum(), x)[0]
    assert torch.allclose(grad, expected, rtol=1e-12)


class Reads(nn.Module):
    """Statistics of its batch norm are read by something else than its forward, or it gets another buffer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm, self.linear = how, nn.BatchNorm1d(4), nn.Linear(4, 4)
        if how == "a hook":
            self.norm.register_forward_hook(lambda m, _, y: y * m.running_var)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.train(self.how != "its class in eval mode")
        if self.how == "a new buffer" and "seen" not in self.norm._buffers:
            self.norm.register_buffer("seen", x.detach().mean())
        if self.how == "a check":
            assert all(b.isfinite().all() and (b >= -9).all() for b in self.norm.buffers())
        y = self.norm(self.linear(x)).tanh()
        self.norm.train()
        return y * self.norm.seen if "seen" in self.norm._buffers else y  # type: ignore[no-any-return]


@pytest.mark.parametrize("execution", ["reversible", "checkpoint", "selective"])
@pytest.mark.parametrize("how", ["a hook", "its class in eval mode", "a new buffer", "a check"])
def test_statistics_that_others_read(how: str, execution: Any) -> None:
    blocks = [Reads(how).double() for _ in range(3)]
    x = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    plain = revlib.CoupledSequential(*copy.deepcopy(blocks))
    stack = revlib.ReversibleSequential(*blocks, treatments=[execution] * 3)
    for _ in range(2):
        grads = [torch.autograd.grad(each(x).square().sum(), [x, *each.parameters()]) for each in (stack, plain)]
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*grads, strict=True))


def test_a_patched_batch_norm_meets_its_statistics_again() -> None:
    stack = revlib.ReversibleSequential(*[nn.BatchNorm1d(4).double() for _ in range(3)])
    for m in stack:
        m.forward = partial(renorm, m)  # type: ignore[method-assign]
    x = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(revlib.CoupledSequential(*copy.deepcopy(list(stack)))(x).square().sum(), x)[0]
    assert torch.allclose(torch.autograd.grad(stack(x).square().sum(), x)[0], expected, rtol=1e-12)


def test_a_module_that_calls_batch_norm_on_buffers_of_its_own_updates_them_once() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(x, self.mean, self.var, training=self.training)  # type: ignore[arg-type]

    stack = revlib.ReversibleSequential(Own(), Own()).eval()
    x = torch.randn(8, 8, requires_grad=True)
    stack(x).sum().backward()
    stack.train()
    plain = revlib.CoupledSequential(*copy.deepcopy(list(stack)))
    for _ in range(2):
        stack(x).sum().backward()
        plain(x)
    for buffer, expected in zip(stack.buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint"])
def test_tensors_made_in_a_block_are_on_the_device_that_was_the_default_in_forward(treatment: Any) -> None:
    devices = []

    class Makes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            devices.append(torch.empty(1).device.type)
            return x.sin()

    stack = revlib.ReversibleSequential(*[Makes() for _ in range(3)], treatments=[treatment] * 3)
    with torch.device("meta"):
        y = stack(torch.randn(4, 8, device="cpu", requires_grad=True))
    y.sum().backward()
    assert devices == ["meta"] * 6
    devices.clear()
    y = stack(torch.randn(4, 8, requires_grad=True)).sum()
    with torch.device("meta"):
        y.backward(torch.ones((), device="cpu"))
    assert devices == ["cpu"] * 6


def test_buffers_without_values_teach_nothing_about_their_module() -> None:
    class Own(nn.Module):
        def __init__(self, device: str) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4, device=device))
            self.register_buffer("var", torch.ones(4, device=device))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.batch_norm(x, self.mean, self.var, training=True)  # type: ignore[arg-type]

    changing = []
    for device in ("meta", "cpu"):
        module = Own(device)
        buffers = Buffers([module])
        module(torch.randn(8, 4, device=device))
        buffers.close()
        changing.append(len(buffers.changing))
    assert changing == [0, 2]


def test_other_buffers_of_a_batch_norm_are_its_own_in_the_second_run() -> None:
    stack = revlib.ReversibleSequential(*[nn.BatchNorm1d(4).double() for _ in range(4)])
    for m in stack:
        prune.random_unstructured(m, "weight", amount=2)  # its mask is a buffer
    x = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(revlib.CoupledSequential(*stack)(x).square().sum(), x)[0]
    assert torch.allclose(torch.autograd.grad(stack(x).square().sum(), x)[0], expected, rtol=1e-12)


def test_statistics_lent_for_the_second_run_are_shared_by_blocks_but_not_within_one() -> None:
    seen = []

    class Watched(nn.BatchNorm1d):
        def __getattr__(self, name: str) -> Any:
            if name == "running_mean" and torch.is_grad_enabled():
                seen.append(super().__getattr__(name).data_ptr())
            return super().__getattr__(name)

    stack = revlib.ReversibleSequential(*[nn.Sequential(Watched(4), Watched(4)) for _ in range(5)])
    y = stack(torch.randn(8, 8, requires_grad=True)).sum()
    seen.clear()
    y.backward()
    assert len(set(seen)) == 2
    assert all(torch.isfinite(b).all() for b in stack.buffers())
