"""Blocks that are checkpointed. The conditions of the matrix have more of them, in all that may surround a stack."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lightning_revlib as revlib


def stack_of(*blocks: nn.Module, treatment: str = "checkpoint") -> revlib.ReversibleSequential:
    return revlib.ReversibleSequential(*blocks, treatments=[treatment] * len(blocks))  # type: ignore[list-item]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def grads(stack: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(stack(x).square().sum(), [x, *stack.parameters()]))


class Score(nn.Module):
    """Calls autograd in its forward."""

    def __init__(self, after: nn.Module | None = None) -> None:
        super().__init__()
        self.energy, self.after = nn.Linear(4, 4).double(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        at = x.detach().requires_grad_()
        score = torch.autograd.grad(self.energy(at).tanh().square().sum(), at, create_graph=True)[0]
        return self.after(self.energy(x).tanh() + score)  # type: ignore[no-any-return]


class Watched(nn.Module):
    """Saves nothing, and lists its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return x + 1


@pytest.mark.parametrize("treatment", ["checkpoint", "selective"])
@pytest.mark.parametrize("after", [nn.Identity(), nn.Dropout(0.5), nn.BatchNorm1d(4).double()])
def test_blocks_that_call_autograd_in_their_forward(treatment: str, after: nn.Module) -> None:
    stack = stack_of(*[Score(copy.deepcopy(after)) for _ in range(3)], treatment=treatment)
    plain = revlib.CoupledSequential(*copy.deepcopy(list(stack)))
    for _ in range(2):  # the second time it is known
        x = leaf(8, 8)
        for grad, expected in zip(grads(stack, x), grads(plain, x), strict=True):
            assert torch.allclose(grad, expected, rtol=1e-12)


def test_blocks_that_begin_to_call_autograd() -> None:
    stack = stack_of(nn.Linear(4, 4).double(), nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4).double()))
    x = leaf(8, 8)
    grads(stack, x)
    stack[0] = Score()
    stack[1] = Score(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4).double()))
    plain = revlib.CoupledSequential(*copy.deepcopy(list(stack)))
    for grad, expected in zip(grads(stack, x), grads(plain, x), strict=True):
        assert torch.allclose(grad, expected, rtol=1e-12)


def test_a_block_that_begins_to_call_autograd_when_it_has_changed_buffers() -> None:
    stack = stack_of(nn.Linear(4, 4).double())
    x = leaf(8, 8)
    grads(stack, x)
    stack[0] = nn.Sequential(nn.BatchNorm1d(4).double(), Score())
    for grad, expected in zip(grads(stack, x), grads(revlib.CoupledSequential(*stack), x), strict=True):
        assert torch.allclose(grad, expected, rtol=1e-12)


@pytest.mark.parametrize("treatment", ["checkpoint", "selective"])
def test_the_second_run_ends_with_what_is_saved_last(treatment: str) -> None:
    first, last = Watched(), Watched()
    stack_of(nn.Sequential(first, nn.Linear(4, 4).double(), last), treatment=treatment)(leaf(8, 8)).sum().backward()
    assert (len(first.calls), len(last.calls)) == (2, 1)


class Noisy(nn.Module):
    """Ends with an operation that saves a tensor before it fills that."""

    def __init__(self, *before: nn.Module) -> None:
        super().__init__()
        self.before = nn.Sequential(*before)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rrelu(self.before(x), training=True)


@pytest.mark.parametrize("treatment", ["checkpoint", "selective"])
@pytest.mark.parametrize("block", [nn.RReLU(), Noisy(), Noisy(nn.Linear(4, 4), nn.RReLU())])
def test_noise_that_is_filled_after_it_is_saved(block: nn.Module, treatment: str) -> None:
    blocks, x = [copy.deepcopy(block).double() for _ in range(3)], leaf(64, 8)
    expected = grads(revlib.CoupledSequential(*blocks), x)
    torch.testing.assert_close(grads(stack_of(*blocks, treatment=treatment), x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_second_run_ends_before_the_last_product(frozen: bool) -> None:
    block = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)).requires_grad_(not frozen)
    flops = []
    for cls in (revlib.CoupledSequential, stack_of):
        with FlopCounterMode(display=False) as counter:
            cls(block)(torch.randn(4, 32, requires_grad=True)).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == 2 * 4 * 16 * 16


def test_a_block_that_goes_on_when_its_second_run_is_to_end() -> None:
    class GoesOn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return x.sin()
            finally:
                x.cos()

    x = leaf(8, 8)
    blocks = [GoesOn() for _ in range(3)]
    for grad, expected in zip(grads(stack_of(*blocks), x), grads(revlib.CoupledSequential(*blocks), x), strict=True):
        assert torch.allclose(grad, expected, rtol=1e-12)


def test_flags_and_parameters_are_as_in_forward() -> None:
    stack = stack_of(*[nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4)).double() for _ in range(3)])
    x, lent = leaf(8, 8), {name: p.detach() * 2 for name, p in stack.named_parameters()}
    plain = revlib.CoupledSequential(*copy.deepcopy(list(stack)))
    torch.manual_seed(1)
    expected = torch.autograd.grad(torch.func.functional_call(plain, lent, x).square().sum(), x)[0]
    torch.manual_seed(1)
    y = torch.func.functional_call(stack, lent, x)
    stack.eval()
    assert torch.allclose(torch.autograd.grad(y.square().sum(), x)[0], expected, rtol=1e-12)
    assert not stack[0][0].training


@pytest.mark.parametrize("treatment", ["checkpoint", "selective"])
def test_what_is_modified_in_place_before_backward(treatment: str) -> None:
    stack, x = stack_of(*[nn.Linear(4, 4).double() for _ in range(2)], treatment=treatment), leaf(8, 8)
    y = stack(x)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match=r"the input of .*0 \(Linear\) has been modified by an inplace operation"):
        y.sum().backward()
    y = stack(x)
    with torch.no_grad():
        stack[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="parameter 'weight' of Linear"):
        y.sum().backward()


def test_blocks_that_compute_something_else() -> None:
    class Differs(nn.Module):
        def __init__(self, change: Any) -> None:
            super().__init__()
            self.change, self.calls = change, itertools.count()

        def forward(self, x: Tensor) -> Tensor:
            return self.change(x) if next(self.calls) else x.sin().cos()  # type: ignore[no-any-return]

    changes = {"and 1 when recomputed": torch.sin, "recomputed float64": lambda x: x.sin()[:1].cos()}
    for message, change in changes.items():
        with pytest.raises(RuntimeError, match=f"(?s)computes something else in backward.*{message}"):
            stack_of(Differs(change))(leaf(8, 8)).sum().backward()


def test_what_a_block_changes_in_place() -> None:
    class Changes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.exp()  # saved
            y.add_(1)
            return y.sin()

    stack, x = stack_of(Changes()), leaf(8, 8)
    for _ in range(2):  # in the first call all is kept until the block ends, later what was fresh is not
        with pytest.raises(RuntimeError, match=r"shape \[8, 4\].*inplace operation inside the block"):
            stack(x).sum().backward()


@pytest.mark.parametrize("treatment", ["checkpoint", "selective"])
def test_what_surrounds_a_stack_keeps_the_inputs_of_its_blocks(treatment: str) -> None:
    stack, x = stack_of(*[nn.Linear(4, 4).double() for _ in range(3)], treatment=treatment), leaf(8, 8)
    expected = grads(stack, x)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> int:
        kept.append(t)
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda number: kept[number].clone()):
        y = stack(x)
    assert [t.shape for t in kept] == [(8, 4)] * 3
    for _ in range(2):
        found = torch.autograd.grad(y.square().sum(), [x, *stack.parameters()], retain_graph=True)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("outer", ["reversible", "checkpoint", "selective"])
@pytest.mark.parametrize("inner", ["checkpoint", "selective"])
def test_within_blocks_that_are_run_again(inner: str, outer: str) -> None:
    def block() -> nn.Module:
        parts = [nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Tanh()) for _ in range(2)]
        return nn.Sequential(stack_of(*parts, treatment=inner), nn.Linear(64, 64)).double()

    held = []
    for depth in (2, 4):
        stack = stack_of(*[block() for _ in range(depth)], treatment=outer)
        plain = revlib.CoupledSequential(*copy.deepcopy(list(stack)))
        x = leaf(16, 128)
        for grad, expected in zip(grads(stack, x), grads(plain, x), strict=True):
            assert torch.allclose(grad, expected, rtol=1e-12)
        with revlib.MemoryMeter() as meter:
            y = stack(x)
            held.append(meter.live - y.nbytes)
        del y
    per_block = {"reversible": 0, "checkpoint": 1, "selective": 2}[outer] * 16 * 64 * 8
    assert inner == "selective" or held[1] - held[0] <= 2 * per_block + 64  # that keeps products wherever it is
