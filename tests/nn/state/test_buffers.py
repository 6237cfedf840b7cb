"""Buffers that blocks read, change or make, and that are exchanged between forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import lightning_revlib as revlib
from tests.nn.state.twins import TREATMENTS, Masked, sample, twins


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_buffers_of_a_functional_call(treatment: Any) -> None:
    stack, plain = twins(Masked, treatment)
    x, other = sample(), {name: torch.randn_like(b) for name, b in stack.named_buffers()}
    (expected,) = torch.autograd.grad(torch.func.functional_call(plain, other, x).square().sum(), x)
    before = [id(b) for b in stack.buffers()]
    (grad,) = torch.autograd.grad(torch.func.functional_call(stack, other, x).square().sum(), x)
    assert torch.allclose(grad, expected, rtol=1e-12)
    assert [id(b) for b in stack.buffers()] == before


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("how", ["assigned", "registered", "deleted", "None", "set", "moved"])
def test_buffers_exchanged_between_forward_and_backward(how: str, treatment: Any) -> None:
    stack, plain = twins(Masked, treatment)
    x = sample()
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    y = stack(x).square().sum()
    for m in stack:
        if how == "assigned":
            m.mask = torch.randn(4, dtype=torch.float64)
        elif how == "registered":
            m.register_buffer("mask", torch.randn(4, dtype=torch.float64))
        elif how == "deleted":
            del m.mask
        elif how == "None":
            m.mask = None
        elif how == "set":
            m.scale = torch.randn(4, dtype=torch.float64)
        else:
            m.float()
    now = [dict(m._buffers) for m in stack]
    (grad,) = torch.autograd.grad(y, x)
    assert torch.allclose(grad, expected, rtol=1e-12)
    for m, buffers in zip(stack, now, strict=True):
        assert m._buffers.keys() == buffers.keys()
        assert all(m._buffers[name] is b for name, b in buffers.items())


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_buffer_modified_in_place_is_named(treatment: Any) -> None:
    stack, _ = twins(Masked, treatment)
    y = stack(sample()).sum()
    with torch.no_grad():
        stack[1].mask.add_(1)  # type: ignore[index, operator]
    stack.eval()  # settings to be lent and put back
    with pytest.raises(RuntimeError, match=r"buffer 'mask' of Masked\(\) has been modified in place since the forward"):
        y.backward()
    assert not any(m.training for m in stack.modules())


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_two_forwards_meet_buffers_of_their_own_in_backward(treatment: Any) -> None:
    stack, plain = twins(Masked, treatment)
    xs, others = [sample(), sample()], [torch.randn(4, dtype=torch.float64) for _ in range(2)]
    expected, losses = [], []
    for x, mask in zip(xs, others, strict=True):
        for model in (stack, plain):
            for m in model.children():
                m.mask = mask
        expected.append(torch.autograd.grad(plain(x).square().sum(), x)[0])
        losses.append(stack(x).square().sum())
    grads = torch.autograd.grad(losses[0] + losses[1], xs)
    assert all(torch.allclose(g, e, rtol=1e-12) for g, e in zip(grads, expected, strict=True))


class Caches(nn.Module):
    """Makes its table in its first call, as rotary embeddings do, and says so by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", None)
        self.length = 0

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.length:
            self.table, self.length = torch.linspace(0, 1, len(x), dtype=x.dtype).unsqueeze(1), len(x)
        return (x * self.table[: len(x)]).tanh()


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_table_that_a_block_makes_in_its_first_call(treatment: Any) -> None:
    stack, plain = twins(Caches, treatment)
    x = sample()
    for _ in range(2):
        (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
        assert torch.allclose(torch.autograd.grad(stack(x).square().sum(), x)[0], expected, rtol=1e-12)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_table_that_a_block_makes_anew_for_a_longer_input(treatment: Any) -> None:
    stack, plain = twins(Caches, treatment)
    for length in (4, 8, 6, 8):
        x = torch.randn(length, 8, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
        assert torch.allclose(torch.autograd.grad(stack(x).square().sum(), x)[0], expected, rtol=1e-12)
        assert all(m.length == len(m.table) == max(length, 4 if length == 4 else 8) for m in stack)


class Counts(nn.Module):
    """Has a buffer that it shares with the other blocks, and may change it."""

    def __init__(self, count: Tensor, changes: bool) -> None:
        super().__init__()
        self.register_buffer("count", count)
        self.changes = changes

    def forward(self, x: Tensor) -> Tensor:
        if self.changes:
            self.count += 1
        return (x + self.count).tanh()


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_shared_buffer_that_a_block_changes_after_another_has_read_it(treatment: Any) -> None:
    x, found = sample(), []
    for cls in (revlib.CoupledSequential, revlib.ReversibleSequential):
        count = torch.ones((), dtype=torch.float64)
        blocks = [Counts(count, changes) for changes in (False, True, False, True)]
        stack = cls(*blocks) if cls is revlib.CoupledSequential else cls(*blocks, treatments=[treatment] * 4)
        found.append([torch.autograd.grad(stack(x).square().sum(), x)[0], count])
    assert all(map(torch.allclose, *found))


class Quantizes(nn.Module):
    """Moves its codebook in place behind an operation that would save it for a gradient that nobody needs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.register_buffer("codes", torch.randn(5, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y, codes = self.linear(x), self.codes
        nearest = torch.cdist(y, codes).argmin(-1)  # type: ignore[arg-type]
        q = codes[nearest]  # type: ignore[index]
        with torch.no_grad():
            codes.index_add_(0, nearest, 0.05 * (y - q))  # type: ignore[operator, union-attr]
        return y.tanh() + (q - y).detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_codebook_that_is_moved_in_place(treatment: Any) -> None:
    stack, plain = twins(Quantizes, treatment)
    x = sample()
    for _ in range(2):
        expected, grad = (torch.autograd.grad(m(x).square().sum(), [x, *m.parameters()]) for m in (plain, stack))
        assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(grad, expected, strict=True))
        for b, other in zip(stack.buffers(), plain.buffers(), strict=True):
            assert torch.allclose(b, other, rtol=1e-12)


def test_other_buffers_of_a_batch_norm_are_its_own_in_the_second_run() -> None:
    stack = revlib.ReversibleSequential(*[nn.BatchNorm1d(4).double() for _ in range(4)])
    for m in stack:
        prune.random_unstructured(m, "weight", amount=2)  # its mask is a buffer
    x = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(revlib.CoupledSequential(*stack)(x).square().sum(), x)[0]
    assert torch.allclose(torch.autograd.grad(stack(x).square().sum(), x)[0], expected, rtol=1e-12)


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("how", ["registered", "filled"])
def test_a_buffer_that_the_first_call_makes(how: str, treatment: Any) -> None:
    class Makes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4).double()
            if how == "filled":
                self.register_buffer("mean", None)

        def forward(self, x: Tensor) -> Tensor:
            is_first = self._buffers.get("mean") is None
            if is_first and how == "filled":
                self.mean = x.detach().mean(0)
            elif is_first:
                self.register_buffer("mean", x.detach().mean(0))
            else:
                self.mean = self.mean * 0.5  # type: ignore[operator]
            return self.linear(x + self.mean).tanh() * (2 if is_first else 1)  # type: ignore[no-any-return]

    stack, plain = twins(Makes, treatment)
    x = sample()
    for _ in range(3):
        (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
        assert torch.allclose(torch.autograd.grad(stack(x).square().sum(), x)[0], expected, rtol=1e-9)
        for ours, theirs in zip(stack.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_buffer_with_a_graph(treatment: Any) -> None:
    """A state that two forwards hand on, before one backward."""

    class State(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4).double()
            self.register_buffer("state", torch.zeros(8, 4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.state = torch.tanh(self.linear(x + self.state))
            return self.state

    x, grads = sample(), []
    for model in twins(State, treatment):
        grads.append(torch.autograd.grad((model(x) + model(2 * x)).square().sum(), [x, *model.parameters()]))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_buffer_with_two_names(treatment: Any) -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.ones(4, dtype=torch.float64))
            self.inner = nn.Tanh()
            self.inner.register_buffer("count", self.seen)

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return self.inner(x * self.inner.count) / self.seen

    found, x = [], sample()
    for stack in twins(Shares, treatment):
        for _ in range(2):
            y = stack(x)
        found.append([torch.autograd.grad(y.square().sum(), x)[0], stack[0].seen, stack[0].inner.count])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9)
