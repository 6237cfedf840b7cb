"""When figures for a plan are measured: once for each kind of block and call, and without a trace."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_revlib as revlib
from tests.nn.plan.workloads import Counted, autocast, counted, measured, mlp, peak, pyramid


def test_measuring_leaves_no_trace() -> None:
    stack = revlib.ReversibleSequential(*pyramid(), memory_budget=0.9)
    fired: list[Any] = []
    next(stack.parameters()).register_post_accumulate_grad_hook(fired.append)
    x, state = torch.randn(4, 16, 8, 8), torch.get_rng_state()
    y = stack(x)
    assert not fired and all(p.grad is None for p in stack.parameters())
    assert stack.get_buffer("0.0.num_batches_tracked") == 1
    torch.set_rng_state(state)
    reference = revlib.restore(stack) and stack
    for m in reference.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
    torch.testing.assert_close(reference(x), y)


class Applies(Counted):
    def __init__(self, does: Any) -> None:
        super().__init__()
        self.up, self.does, self.down = nn.Linear(16, 64), does, nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        Counted.calls[id(self)] += 1
        x, does = self.up(x), self.does
        if isinstance(does, dict):
            does = does["what"][0]
        return self.down(getattr(does, "of", does)(x))


class Method:
    def __init__(self, count: int) -> None:
        self.count = count

    def of(self, x: Tensor) -> Tensor:
        for _ in range(self.count):
            x = x.tanh()
        return x


def test_measuring_leaves_numbers_and_generators_as_they_are() -> None:
    class Warmup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls, self.generator = nn.Linear(8, 8), 0, torch.Generator()

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            noise = torch.rand(x.shape, generator=self.generator, dtype=x.dtype)
            return self.linear(x).tanh() * noise * self.calls  # type: ignore[no-any-return]

    found: list[list[Any]] = []
    x = torch.randn(8, 16, dtype=torch.float64)
    for budget in ("1MiB", None):
        torch.manual_seed(0)
        stack = revlib.ReversibleSequential(*[Warmup() for _ in range(4)], memory_budget=budget).double()
        found.append([])
        for _ in range(3):
            found[-1] += torch.autograd.grad(stack(x).square().sum(), list(stack.parameters()))
        assert [block.calls for block in stack] == [3] * 4
    assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(*found, strict=True))


def test_blocks_that_are_exchanged_are_measured() -> None:
    def block(hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(32, hidden), nn.GELU(), nn.Linear(hidden, 32))

    stack = revlib.ReversibleSequential(*[block(32) for _ in range(6)], memory_budget="300KiB")
    x = torch.randn(64, 64, requires_grad=True)
    stack(x).sum().backward()
    for i in range(6):
        stack[i] = block(1024)
    with pytest.raises(ValueError, match=r"memory_budget='300KiB' is 300\.0 KiB, and .* need at least"):
        stack(x)


def test_blocks_with_reentrant_checkpoints_cannot_be_measured() -> None:
    class Reentrant(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=True)  # type: ignore[no-any-return]

    stack = revlib.ReversibleSequential(Reentrant(4, 4), memory_budget="1MiB")
    with pytest.raises(RuntimeError, match=r"0 \(Reentrant\) calls .* memory_budget='1MiB' .* use_reentrant=False"):
        stack(torch.randn(2, 8, requires_grad=True))


class Called(Counted):
    """Takes more or less, as its arguments say."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(16, 64), nn.Dropout(0.1), nn.Linear(64, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None, act: str = "relu", often: bool = False) -> Tensor:
        Counted.calls[id(self)] += 1
        x = getattr(self.drop(self.up(x)), act)()
        for _ in range(4 if often else 0):
            x = x.tanh()
        return self.down(x if mask is None else (x.to(mask.dtype) * mask).to(x.dtype))


def test_replans_for_larger_shapes_only() -> None:
    stack = revlib.ReversibleSequential(*[mlp(16) for _ in range(4)], memory_budget=0.5)
    plans = []
    for rows in (64, 32, 64, 128, 64):
        stack(torch.randn(rows, 32))
        plans.append(stack.plan)
    assert plans[0] is plans[1] is plans[2] is plans[4] and plans[3] is not plans[0]


def test_stored_layers_are_not_planned() -> None:
    layers = revlib.ReversibleModuleList([mlp(32) for _ in range(3)], coupling="midpoint", memory_budget=0.5)
    revlib.restore(layers)
    y = x = torch.randn(64, 32, requires_grad=True)
    for layer in layers:
        y = layer(y)
    assert layers.plan is None and x.requires_grad


def test_backward_is_measured_outside_of_autocast() -> None:
    seen = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            seen.append(torch.is_autocast_enabled("cpu"))
            return 2 * grad * ctx.saved_tensors[0]

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Square.apply(x)

    stack = revlib.ReversibleSequential(Block(), Block(), memory_budget=1.0)
    with autocast(True):
        stack(torch.randn(4, 8, requires_grad=True))
    assert seen and not any(seen)


@pytest.mark.parametrize("around", ["stack", "checkpoint"])
def test_a_stack_that_is_run_again_follows_no_plan(around: str) -> None:
    def make() -> nn.Module:
        return revlib.ReversibleSequential(*[nn.Linear(8, 8).double() for _ in range(4)], memory_budget="1MiB")

    def run(x: Tensor) -> Tensor:
        return inner(x).tanh()

    torch.manual_seed(0)
    inner, x = make(), torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
    outer = revlib.ReversibleSequential(nn.Sequential(inner, nn.Linear(16, 16).double()), make())
    for _ in range(2):
        with pytest.warns(UserWarning, match="its memory_budget='1MiB' is not followed"):
            if around == "stack":
                outer(x).square().sum().backward()
            else:
                torch.utils.checkpoint.checkpoint(run, x[:, :16], use_reentrant=False).sum().backward()


def test_alike_blocks_are_measured_once() -> None:
    stack = revlib.ReversibleSequential(*[counted(16) for _ in range(32)], memory_budget=0.5)
    x = torch.randn(8, 32, requires_grad=True)
    assert 0 < measured(lambda: stack(x), stack) <= 2 * 12  # four treatments, of the first, the last and the others
    assert measured(lambda: stack(x), stack) == 0


@pytest.mark.parametrize(
    ("light", "heavy"),
    [(lambda: torch.relu, lambda: torch.logit), (lambda: Method(1), lambda: Method(5)),
     (lambda: {"what": [torch.tanh]}, lambda: {"what": [lambda x: x.tanh().sin() * x.sigmoid()]})],
)  # fmt: skip
def test_blocks_that_differ_in_an_attribute_are_measured_each(light: Any, heavy: Any) -> None:
    x, runs = torch.randn(64, 32, requires_grad=True), []
    for kinds in ([light] * 8, [light] * 4 + [heavy] * 4):
        stack = revlib.ReversibleSequential(*[Applies(make()) for make in kinds], memory_budget=0.8)
        runs.append(measured(partial(stack, x), stack))
        assert stack.plan is not None
        assert peak(stack, x)[0] <= stack.plan.limit
    assert runs[1] > runs[0] > 0


@pytest.mark.parametrize("how", ["dtype", "text", "flag", "nothing", "mode", "view", "more"])
def test_a_call_that_takes_more_is_measured(how: str) -> None:
    stack, x = revlib.ReversibleSequential(*[Called() for _ in range(4)], memory_budget=1.0), torch.randn(64, 32)
    x.requires_grad_()
    ways: dict[str, list[Any]] = {
        "dtype": [{"mask": torch.ones(64, 64)}, {"mask": torch.ones(64, 64, dtype=torch.float64)}],
        "text": [{"act": "relu"}, {"act": "cos"}],
        "flag": [{"often": False}, {"often": True}],
        "nothing": [{"mask": None}, {}],
        "more": [{}, {"mask": torch.ones(64, 64)}],
    }
    plans = []
    for second in (False, True):
        if how == "mode":
            for block in stack:
                block.train(second)
        given = x.view_as(x) if how == "view" and second else x
        call = partial(stack, given, **ways.get(how, [{}, {}])[second])
        assert measured(call, stack) > 0
        assert measured(call, stack) == 0
        plans.append(stack.plan)
    assert how == "nothing" or plans[0] != plans[1]


def test_a_number_among_the_arguments_may_be_another_in_each_step() -> None:
    stack, x = revlib.ReversibleSequential(*[Called() for _ in range(4)], memory_budget=1.0), torch.randn(64, 32)
    stack(x, often=2)
    for step in range(3, 6):
        assert measured(partial(stack, x, often=step), stack) == 0


def test_plans_of_other_signatures_are_kept() -> None:
    stack = revlib.ReversibleSequential(*[counted(16) for _ in range(4)], memory_budget=0.6)
    plans: list[Any] = []
    for repeat in range(3):
        for training, shape in ((True, (8, 20, 32)), (False, (8, 20, 32)), (True, (20, 8, 32))):
            stack.train(training).split_dim = 2
            runs = measured(partial(stack, torch.randn(shape)), stack)
            assert (runs > 0) == (repeat == 0)
            plans.append(stack.plan)
    assert plans[:3] == plans[3:6] == plans[6:]
    next(stack.parameters()).requires_grad_(False)
    assert measured(partial(stack, torch.randn(8, 20, 32)), stack) > 0
