"""Parameters that their block's own forward sets: codebooks moved by an average, data-dependent initialisation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.nn.state.twins import TREATMENTS, sample, twins


class Quantizes(nn.Module):
    """Moves its codebook, a parameter without gradient; `how` is by an operation in place, or past autograd."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 4).double(), how
        book = nn.Parameter(torch.randn(5, 4).double(), requires_grad=False)
        self.codes = nn.Embedding(5, 4) if how == "embedding" else nn.Module()
        self.codes.weight = book

    def forward(self, x: Tensor) -> Tensor:
        h, book = self.layer(x), self.codes.weight
        best = torch.cdist(h, book).argmin(1)
        q = book[best]
        with torch.no_grad():
            n = nn.functional.one_hot(best, 5).to(h)
            moved = 0.9 * book + 0.1 * (n.T @ h) / (n.sum(0)[:, None] + 1e-5)
            (book.data if self.how == "data" else book).copy_(moved)
        return h.tanh() + (q - h).detach()


class ActNorm(nn.Module):
    """Sets its bias in its first call, of which it keeps note in a buffer or an attribute."""

    ready: Any

    def __init__(self, buffer: bool, frozen: bool) -> None:
        super().__init__()
        self.bias, self.layer = (
            nn.Parameter(torch.zeros(4).double(), requires_grad=not frozen),
            nn.Linear(4, 4).double(),
        )
        if buffer:
            self.register_buffer("ready", torch.tensor(0))
        else:
            self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            with torch.no_grad():
                self.bias.copy_(-x.mean(0))
            if isinstance(self.ready, Tensor):
                self.ready.fill_(1)
            else:
                self.ready = True
        return self.layer(x + self.bias).tanh()


def train(stack: nn.Module, forwards: int, backwards: int) -> list[Tensor | None]:
    """Return the gradients of this number of forwards and backwards, and what the parameters are then."""
    torch.manual_seed(1)
    losses = [stack(sample()).square().sum() for _ in range(forwards)]
    for loss in losses if backwards > 1 else [torch.stack(losses).sum()]:
        loss.backward()
    return [t for p in stack.parameters() for t in (p.grad, p.detach())]


BLOCKS = {
    **{f"codebook, {how}": (lambda how=how: Quantizes(how)) for how in ("in place", "data", "embedding")},
    **{
        f"{'frozen ' * frozen}act norm, {'buffer' if buffer else 'bool'}": (lambda b=buffer, f=frozen: ActNorm(b, f))
        for buffer in (True, False)
        for frozen in (True, False)
    },
}


class Looks(nn.Module):
    """Looks vectors up whose norms torch limits in place."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4, max_norm=0.5).double()

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() + self.table(x.detach().argmax(-1) % 3)


@pytest.mark.parametrize(("forwards", "backwards"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_parameters_that_a_forward_sets(block: str, treatment: Any, forwards: int, backwards: int) -> None:
    stack, plain = twins(BLOCKS[block], treatment)  # type: ignore[arg-type]
    for found, expected in zip(train(stack, forwards, backwards), train(plain, forwards, backwards), strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.allclose(found, expected, rtol=1e-9)  # type: ignore[arg-type]


@pytest.mark.parametrize("treatments", [["reversible", "checkpoint"], ["checkpoint", "reversible"]])
@pytest.mark.parametrize("block", [name for name in BLOCKS if "act norm" in name])
def test_parameters_that_a_first_call_sets_beside_a_checkpointed_block(block: str, treatments: Any) -> None:
    plain = revlib.CoupledSequential(*[BLOCKS[block]() for _ in range(2)])
    stack = revlib.ReversibleSequential(*copy.deepcopy(list(plain)), treatments=treatments)
    for _ in range(2):
        stack.zero_grad(), plain.zero_grad()
        torch.testing.assert_close(train(stack, 1, 1), train(plain, 1, 1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_table_whose_norms_are_limited(treatment: Any) -> None:
    stack, plain = twins(Looks, treatment)
    assert all(map(torch.allclose, train(stack, 1, 1), train(plain, 1, 1)))  # type: ignore[arg-type]


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_codebook_that_requires_a_gradient_before_backward(treatment: Any) -> None:
    stack, plain = twins(lambda: Quantizes("in place"), treatment)
    x = sample()
    expected = torch.autograd.grad(plain(x).square().sum(), x)[0]
    y = stack(x).square().sum()
    stack.requires_grad_(True)
    assert torch.allclose(torch.autograd.grad(y, x)[0], expected)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in stack.parameters())


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_codebook_that_requires_a_gradient_all_the_time_is_named(treatment: Any) -> None:
    stack, _ = twins(lambda: Quantizes("in place").requires_grad_(True), treatment)
    before = [p.detach().clone() for p in stack.parameters()]
    y = stack(sample()).sum()
    moved = [p.detach().clone() for p in stack.parameters()]
    assert not all(map(torch.equal, before, moved))
    with pytest.raises(
        RuntimeError, match=r"stack\.\d \(Quantizes\): parameter 'weight' of Module\(\) is moved by its block's call"
    ):
        y.backward()
    assert all(map(torch.equal, stack.parameters(), moved))


class Averages(nn.Module):
    """Moves a layer of torch's, without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).tanh()
        self.layer.weight.mul_(0.5)
        return y


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_layer_that_is_moved_is_named(treatment: Any) -> None:
    stack = revlib.ReversibleSequential(Averages(), treatments=[treatment])
    with pytest.raises(
        RuntimeError,
        match=r"stack\.0 \(Averages\): parameter 'weight' of Linear\(.*is changed in place by its block's call",
    ):
        stack(sample())


class Scales(nn.Module):
    """A layer of a library's, such as quantised weights; it may move its frozen weight from its second call on."""

    def __init__(self, moves: bool = False) -> None:
        super().__init__()
        self.weight, self.moves, self.calls = nn.Parameter(torch.ones(4, 4000), requires_grad=False), moves, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.moves and self.calls > 1:
            self.weight.mul_(0.9)
        return (x @ self.weight).tanh()[:, :4]


def test_weights_that_no_call_moves_are_copied_once() -> None:
    stack, x = revlib.ReversibleSequential(*[Scales() for _ in range(3)]), torch.randn(2, 8, requires_grad=True)
    peaks = []
    for _ in range(2):
        with revlib.MemoryMeter() as meter:
            stack(x)
        peaks.append(meter.peak)
    assert peaks[0] - peaks[1] > 0.9 * stack[0].weight.nbytes  # type: ignore[union-attr]


def test_a_weight_that_a_later_call_moves_is_named() -> None:
    stack, x = revlib.ReversibleSequential(Scales(moves=True)), torch.randn(2, 8, requires_grad=True)
    stack(x).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"parameter 'weight' of Scales\(\) requires no gradient .* make it a buffer"
    ):
        stack(x)
