"""Nothing outlives its graph, with the garbage collector off: it sees no cycle that leads through a graph."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib

WIDTH = 8


class Given:
    """An argument of the blocks, which steps hold as long as they live."""


class Block(nn.Module):
    """Returns its branch and a loss; draws random numbers, or raises, from the call on that a test says."""

    def __init__(self, draws: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.draws, self.fails = draws, [False]  # a list, as plain attributes are put back

    def forward(self, x: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        if self.fails[0]:
            raise MemoryError
        out = self.layers(x)
        if self.draws:
            out = nn.functional.dropout(out)
        return out, out.square().mean()


class Sequential(nn.Module):
    def __init__(self, *blocks: nn.Module, **options: Any) -> None:
        super().__init__()
        self.blocks = revlib.ReversibleSequential(*blocks, split_dim=None, coupling="midpoint", **options)

    def forward(self, x: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        y, extras = self.blocks(x, given)
        return y, torch.stack([loss for (loss,) in extras]).sum()


class ModuleList(nn.Module):
    def __init__(self, *blocks: nn.Module, **options: Any) -> None:
        super().__init__()
        self.blocks = revlib.ReversibleModuleList(blocks, coupling="midpoint", **options)

    def forward(self, x: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        losses = []
        for block in self.blocks:
            x, loss = block(x, given)
            losses.append(loss)
        return x, torch.stack(losses).sum()


Call = Callable[[], tuple[Tensor, Tensor]]


def backward(model: Any, call: Call) -> None:
    y, loss = call()
    (y.sum() + loss).backward()


def several_backwards(model: Any, call: Call) -> None:
    y, _ = call()
    for _ in range(3):
        y.sum().backward(retain_graph=True)


def double_backward(model: Any, call: Call) -> None:
    y, loss = call()
    grads = torch.autograd.grad(y.square().sum() + loss, list(model.parameters()), create_graph=True)
    torch.autograd.grad(sum(grad.square().sum() for grad in grads), list(model.parameters()), allow_unused=True)


def first_derivative_with_a_graph(model: Any, call: Call) -> None:
    torch.autograd.grad(call()[0].square().sum(), list(model.parameters()), create_graph=True)


def extra_outputs_only(model: Any, call: Call) -> None:
    _, loss = call()
    loss.backward()


def no_backward(model: Any, call: Call) -> None:
    call()


def part_of_the_graph(model: Any, call: Call) -> None:
    y, _ = call()
    torch.autograd.grad(y.sum(), list(model.blocks[2].parameters()))


def unexpected_draws(model: Any, call: Call) -> None:
    for draws in (False, True, False, True):
        for block in model.blocks:
            block.draws = draws
        y, loss = call()
        if draws:
            (y.sum() + loss).backward()


def unexpected_draws_without_backward(model: Any, call: Call) -> None:
    for draws in (False, True):
        for block in model.blocks:
            block.draws = draws
        y, loss = call()
        if not draws:
            (y.sum() + loss).backward()


def second_backward_of_a_freed_graph(model: Any, call: Call) -> None:
    y, _ = call()
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def error_in_forward(model: Any, call: Call) -> None:
    model.blocks[2].fails[0] = True
    with pytest.raises(MemoryError):
        call()


def error_in_backward(model: Any, call: Call) -> None:
    y, loss = call()
    model.blocks[1].fails[0] = True
    with pytest.raises(MemoryError):
        (y.sum() + loss).backward()


def error_in_a_hook(model: Any, call: Call) -> None:
    def fail(grad: Tensor) -> None:
        raise KeyError("hook")

    handle = next(model.blocks[1].parameters()).register_hook(fail)
    y, _ = call()
    with pytest.raises(KeyError, match="hook"):
        y.sum().backward()
    handle.remove()


USES = [
    backward, several_backwards, double_backward, first_derivative_with_a_graph, extra_outputs_only, no_backward,
    part_of_the_graph, unexpected_draws, unexpected_draws_without_backward, second_backward_of_a_freed_graph,
    error_in_forward, error_in_backward, error_in_a_hook,
]  # fmt: skip
TREATMENTS = {
    "reversible": ["reversible"] * 4,
    "checkpoint": ["checkpoint"] * 4,
    "selective": ["selective"] * 4,
    "mixed": ["reversible", "reversible", "checkpoint", "reversible"],
}


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.disable()
    gc.freeze()  # what has been made before need not be searched by `gc.collect`
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.parametrize("treatments", TREATMENTS)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("kind", [Sequential, ModuleList])
def test_nothing_outlives_its_graph(kind: Any, use: Any, treatments: str, without_collector: None) -> None:
    model = kind(*[Block(draws=k % 2 == 1) for k in range(4)], treatments=TREATMENTS[treatments]).double()
    x = torch.randn(256, WIDTH, dtype=torch.float64, requires_grad=True)
    for t in (x, *model.parameters()):
        t.grad = torch.zeros_like(t)
    given: list[weakref.ref[Given]] = []
    live: list[int] = []

    def call() -> tuple[Tensor, Tensor]:
        argument = Given()
        given.append(weakref.ref(argument))
        return model(x, argument)

    with revlib.MemoryMeter() as meter:
        for _ in range(2):
            use(model, call)
            for block in model.blocks:
                block.fails[0] = False
            if use.__name__.startswith("error"):
                torch.zeros((), requires_grad=True).square().backward()  # until then torch keeps a graph that failed
                gc.collect()  # a traceback makes cycles that Python sees
            live.append(meter.live)
    assert given and [ref() for ref in given] == [None] * len(given)
    assert live[0] == live[1] < x.nbytes / 2, x.nbytes  # a sample of the streams, for `drift`


def test_what_is_rebuilt_last_is_freed_while_the_output_is_alive() -> None:
    blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(3)]
    stack, x = revlib.ReversibleSequential(*blocks), torch.randn(64, 128, requires_grad=True)
    for p in stack.parameters():
        p.grad = torch.zeros_like(p)
    with revlib.MemoryMeter() as meter:
        y = stack(x * 2)
        y.backward(torch.ones_like(y))
        x.grad = None
        assert meter.live == pytest.approx(y.nbytes, rel=0.01)


def test_a_forward_that_fails_leaves_no_hooks() -> None:
    model = ModuleList(*[Block() for _ in range(3)])
    model.blocks[1].fails[0] = True  # type: ignore[union-attr]
    with pytest.raises(MemoryError):
        model(torch.randn(2, WIDTH), Given())
    y = torch.randn(3, requires_grad=True)
    assert torch.equal((y * y).grad_fn._saved_self, y)  # type: ignore[union-attr]


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint"])
def test_a_list_that_blocks_add_outputs_to(treatment: str) -> None:
    class Adds(nn.Linear):
        def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:  # type: ignore[override]
            seen.append(super().forward(x))
            return seen[-1]

    stack = revlib.ReversibleSequential(*[Adds(WIDTH, WIDTH) for _ in range(3)], treatments=[treatment] * 3)
    gc.disable()
    try:
        x = torch.randn(2, 2 * WIDTH, requires_grad=True) * 1
        given = Given()
        x.register_hook(lambda grad, given=given: None)
        alive = weakref.ref(given)
        del given
        stack(x, [])
        del x
        assert alive() is None
    finally:
        gc.enable()
