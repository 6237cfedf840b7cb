"""Blocks of which products are kept, and the rest computed again."""

from __future__ import annotations

import copy
import threading
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import noop_context_fn

import lightning_revlib as revlib


def stack_of(*blocks: nn.Module, treatment: str = "checkpoint") -> revlib.ReversibleSequential:
    return revlib.ReversibleSequential(*blocks, treatments=[treatment] * len(blocks))  # type: ignore[list-item]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def grads(stack: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(stack(x).square().sum(), [x, *stack.parameters()]))


@pytest.mark.parametrize("treatment", ["checkpoint", "selective"])
def test_products_that_are_written_to_a_tensor_or_changed_behind_the_block(treatment: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = torch.full_like(x, 9.0).detach()
            with torch.no_grad():
                torch.mm(x.detach(), self.linear.weight, out=out)
            h = self.linear(x)
            return self.last(h.tanh() * out), h

    stack, x = stack_of(Block().double(), Block().double(), treatment=treatment), leaf(8, 8)
    found = []
    for each in (stack, revlib.CoupledSequential(*stack)):
        y, extras = each(x)
        with torch.no_grad():
            for (h,) in extras:
                h.mul_(2)
        found.append(torch.autograd.grad(y.square().sum(), [x, *each.parameters()]))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*found, strict=True))


def test_a_stack_in_two_threads_under_selective() -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(1e-3)
            return x * 1

    stack = stack_of(nn.Sequential(nn.LayerNorm(4), Waits(), nn.Tanh()).double(), treatment="selective")
    x, done = leaf(8, 8), threading.Event()

    def evaluate() -> None:
        with torch.no_grad():
            while not done.is_set():
                stack(x)

    other = threading.Thread(target=evaluate)
    other.start()
    for _ in range(10):
        stack(x).square().sum().backward()
    done.set()
    other.join()
    assert x.grad is not None


def test_selective_holds_no_product_that_the_second_run_does_not_come_to() -> None:
    class Counts(revlib.MemoryMeter):
        products = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.products += func is torch.ops.aten.addmm.default
            return super().__torch_dispatch__(func, types, args, kwargs)

    block = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64)).double()
    stack = stack_of(block, treatment="selective")
    x = torch.randn(16, 128, dtype=torch.float64)
    for first in (True, False):
        with Counts() as meter:
            y = stack(x.requires_grad_())
            held = meter.live - y.nbytes
            y.sum().backward()
        assert meter.products == 2
        assert first or held == 16 * 32 * 8  # the first product; the input is there anyway


def test_modes_within_blocks_and_modules_with_a_forward_of_their_own() -> None:
    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Within(nn.Module):
        """Enters a mode, with light modules in it."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            with Looks():
                return self.inner(x)  # type: ignore[no-any-return]

    own, inplace = nn.Tanh(), nn.ReLU(inplace=True)
    own.forward = lambda x: x.sin()  # type: ignore[method-assign]
    parts = [nn.BatchNorm1d(4), nn.Linear(4, 4), inplace, nn.Linear(4, 4), own, Within(), nn.Linear(4, 4)]
    stack = stack_of(*[copy.deepcopy(nn.Sequential(*parts)).double() for _ in range(3)], treatment="selective")
    plain = revlib.CoupledSequential(*copy.deepcopy(list(stack)))
    before = [dict(m.__dict__) for m in stack.modules()]
    x = leaf(8, 8)
    for grad, expected in zip(grads(stack, x), grads(plain, x), strict=True):
        assert torch.allclose(grad, expected, rtol=1e-12)
    assert [m.__dict__.get("forward") for m in stack.modules()] == [m.get("forward") for m in before]
    wrong = stack_of(nn.Sequential(nn.Tanh(), nn.Linear(3, 4)).double(), treatment="selective")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        wrong(x)
    assert "forward" not in wrong[0][0].__dict__


class Asking(nullcontext):  # type: ignore[type-arg]
    """A context as selective checkpointing makes it from torch 2.14 on."""

    respect_saved_tensors_hooks: bool | None = None


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint"])
@pytest.mark.parametrize(("given", "then"), [(None, False), (False, False), (True, True)])
def test_hooks_of_the_engine_are_no_users_hooks(treatment: Any, given: bool | None, then: bool) -> None:
    made: list[Asking] = []

    def contexts() -> tuple[Asking, Asking]:
        made.extend((Asking(), Asking()))
        made[0].respect_saved_tensors_hooks = given
        return made[0], made[1]

    stack = revlib.ReversibleSequential(nn.Linear(4, 4), treatments=[treatment], context_fn=contexts)
    stack(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert made[0].respect_saved_tensors_hooks is then


def test_contexts_of_a_user_are_refused() -> None:
    options: Any = {"treatments": ["checkpoint", "selective"], "context_fn": noop_context_fn}
    with pytest.raises(ValueError, match=r"context_fn=.*: treatment 'selective' has contexts .* take 'checkpoint'"):
        revlib.ReversibleSequential(nn.Linear(4, 4), nn.Linear(4, 4), **options)
    options["treatments"][1] = "reversible"
    revlib.ReversibleSequential(nn.Linear(4, 4), nn.Linear(4, 4), **options)


def test_a_product_that_is_given_other_data() -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x)
            h.data = 2 * h.data
            return h.tanh()

    blocks, x = [Doubles().double() for _ in range(3)], leaf(2, 8)
    expected, found = (grads(stack_of(*blocks, treatment=treatment), x) for treatment in ("store", "selective"))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
