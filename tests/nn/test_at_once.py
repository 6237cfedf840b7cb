"""Small steps, of which several are undone at once: the conditions of the matrix, and what that may cost.

Here the matrix runs as from a stack's second call on: what autograd wants to save is let go at once. And with
`on_drift="ignore"`, where the first step is not run again to its end.
"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from lightning_revlib.nn.engine.frame import Frame
from lightning_revlib.nn.engine.tape import Tape
from lightning_revlib.nn.stacks.reversible import Reversible
from tests.nn.conditions import CONDITIONS
from tests.nn.test_matrix import COUPLINGS, compare


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_equals_ordinary_autograd(coupling: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reversible, "_calls_autograd", False)
    compare(coupling, name, "float64", on_drift="ignore")


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps in the order in which they are undone, and "backward" for the backward of each."""
    order: list[str] = []
    replay = Frame.replay

    def noted(self: Frame, *args: Tensor) -> Tensor:
        order.append(self.step.key)
        return replay(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Frame, "replay", noted)
    return order


def stack_of(blocks: int, order: list[str], width: int = 4) -> revlib.ReversibleSequential:
    stack = revlib.ReversibleSequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(blocks)])
    for block in stack:
        block[0].weight.register_hook(lambda grad: order.append("backward"))  # type: ignore[union-attr, index]
    return stack


def test_as_many_as_are_small_together(order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of(5, order)
    step = 2 * 3 * 4 * 4 + 4 * 4 * 4 + 3 * 4 * 4  # input, weight, output of tanh, and a stream
    monkeypatch.setattr(Tape, "AT_ONCE", 2 * step)
    stack(torch.randn(3, 8)).sum().backward()
    assert order == ["4", "3", *["backward"] * 2, "2", "1", *["backward"] * 2, "0", "backward"]


def test_large_ones_one_by_one(order: list[str]) -> None:
    stack = stack_of(3, order, width=64)
    stack(torch.randn(512, 128)).sum().backward()
    assert order == ["2", "backward", "1", "backward", "0", "backward"]


def test_none_that_backward_does_not_need(order: list[str]) -> None:
    stack = stack_of(3, order)
    stack[0].requires_grad_(False)
    stack(torch.randn(3, 8)).sum().backward()
    assert order == ["2", "1", *["backward"] * 2]


@pytest.mark.parametrize("options", [{"memory_budget": 0.9}, {"context_fn": lambda: (torch.enable_grad(),) * 2}])
def test_one_by_one_by_request(options: dict[str, object], order: list[str]) -> None:
    stack = revlib.ReversibleSequential(*stack_of(2, order), **options)  # type: ignore[arg-type]
    y = stack(torch.randn(3, 8))
    order.clear()  # a budget has measured
    y.sum().backward()
    assert order == ["1", "backward", "0", "backward"]


def test_one_by_one_where_parameters_may_be_sharded(order: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    stack = stack_of(2, order)
    stack(torch.randn(3, 8)).sum().backward()
    assert order == ["1", "backward", "0", "backward"]


class Unused(nn.Module):
    """Saves a tensor for an output that nobody uses; notes how many such are alive when its backward has run."""

    def __init__(self, made: list[weakref.ref[Tensor]], alive: list[int]) -> None:
        super().__init__()
        self.made, self.alive = made, alive

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone()
        x.register_hook(lambda grad: self.alive.append(sum(ref() is not None for ref in self.made)))
        unused = x.exp()
        self.made.append(weakref.ref(unused))
        return x.tanh(), unused.square()


def test_leaves_nothing_behind() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    stack = revlib.ReversibleSequential(*[Unused(made, alive) for _ in range(64)])
    y, extras = stack(torch.randn(64, 64, requires_grad=True))
    made.clear()
    y.sum().backward(retain_graph=True)
    assert len(alive) == len(extras) == 64 and max(alive) <= Tape.AT_ONCE // (64 * 32 * 4)


def test_what_it_holds() -> None:
    def peak() -> int:
        stack = revlib.ReversibleSequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(256)])
        x = torch.randn(64, 16)
        for p in stack.parameters():
            p.grad = torch.zeros_like(p)
        with revlib.MemoryMeter() as meter:
            stack(x).sum().backward()
        return meter.peak

    more, at_once = peak(), Tape.AT_ONCE
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tape, "AT_ONCE", 0)
        assert peak() < more < peak() + at_once
