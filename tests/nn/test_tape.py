from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lightning_revlib as revlib
from lightning_revlib.nn.engine import release as alone
from lightning_revlib.nn.engine.frame import Frame
from lightning_revlib.nn.engine.tape import Tape
from lightning_revlib.nn.state.parameters import Settings
from tests.nn.streams import Device


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def conv(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1))


def noisy(width: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, width), nn.Dropout(0.1), nn.Tanh())


KINDS = {"mlp": (mlp, (128, 128)), "conv": (conv, (4, 16, 16, 16)), "noisy": (noisy, (1024, 64))}


def measure(stack: nn.Module, x: Tensor) -> tuple[float, float]:
    """Bytes held after forward and peak in backward, over the output's bytes."""
    for p in stack.parameters():
        p.grad = torch.zeros_like(p)
    with revlib.MemoryMeter() as meter:
        y = stack(x)
        held = meter.live
        g = torch.ones_like(y)
        meter.reset_peak()
        y.backward(g)
        return held / y.nbytes, meter.peak / y.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_the_output_at_any_depth(kind: str) -> None:
    make, shape = KINDS[kind]
    x = torch.randn(shape, requires_grad=True)
    figures = [measure(revlib.ReversibleSequential(*[make(shape[1] // 2)] * depth), x) for depth in (4, 16, 64, 256)]
    assert all(held == pytest.approx(1.0, rel=0.01) for held, _ in figures)
    assert all(peak == pytest.approx(figures[0][1], rel=0.01) for _, peak in figures)


def test_what_is_rebuilt_last_is_let_go_while_the_output_is_alive() -> None:
    stack, x = revlib.ReversibleSequential(*[mlp(64) for _ in range(3)]), torch.randn(64, 128, requires_grad=True)
    for p in stack.parameters():
        p.grad = torch.zeros_like(p)
    with revlib.MemoryMeter() as meter:
        y = stack(x * 2)
        y.backward(torch.ones_like(y))
        x.grad = None
        assert meter.live == pytest.approx(y.nbytes, rel=0.01)


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_training_step_holds_neither_the_output_nor_its_gradient_for_long(
    chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, peaks = torch.randn(256, 64, requires_grad=True), torch.randn(256, 64), []
    for large, depth in ((0, 1), (0, 2), (0, 8), (1 << 40, 8)):
        monkeypatch.setattr(alone, "LARGE", large)
        stack = revlib.ReversibleSequential(*[mlp(32) for _ in range(depth)], chunks=chunks)
        for p in stack.parameters():
            p.grad = torch.zeros_like(p)
        with revlib.MemoryMeter() as meter:
            loss = (stack(x) * weight).sum()
            meter.reset_peak()
            loss.backward()
        peaks.append(meter.peak / x.nbytes)
    assert peaks[0] == peaks[1] == peaks[2] == pytest.approx(peaks[3] - 0.5, abs=0.01)


@pytest.mark.parametrize("blocks", [[nn.Linear(8, 8)], [mlp(8), mlp(8)], [nn.Tanh(), mlp(8)], [mlp(8), nn.Tanh()]])
def test_what_the_caller_holds_is_not_copied(blocks: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    x, figures = torch.randn(256, 16, requires_grad=True), []
    for large in (0, 1 << 40):
        monkeypatch.setattr(alone, "LARGE", large)
        figures.append(measure(revlib.ReversibleSequential(*blocks), x))
    assert figures[0] == figures[1]


def test_weights_that_autocast_has_cast_do_not_pile_up() -> None:
    peaks = []
    for depth in (4, 32):
        stack, x = revlib.ReversibleSequential(*[mlp(64) for _ in range(depth)]), torch.randn(4, 128)
        with torch.autocast("cpu", torch.bfloat16), revlib.MemoryMeter() as meter:
            stack(x)
        peaks.append(meter.peak)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("kind", KINDS)
def test_peak_is_below_revlib(kind: str) -> None:
    peer = pytest.importorskip("revlib")
    make, shape = KINDS[kind]
    x, blocks = torch.randn(shape, requires_grad=True), [make(shape[1] // 2) for _ in range(8)]
    held, peak = measure(revlib.ReversibleSequential(*blocks), x)
    peer_held, peer_peak = measure(peer.ReversibleSequential(*copy.deepcopy(blocks), split_dim=1), x)
    assert held < peer_held
    assert peak < (0.9 if kind == "noisy" else 0.85) * peer_peak


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coupling", [name for name, cls in revlib.COUPLINGS.items() if not cls.needs_grid])
def test_flops_are_four_thirds(kind: str, coupling: str) -> None:
    make, shape = KINDS[kind]
    blocks = [make(shape[1] // 2) for _ in range(6)]
    if coupling == "affine":
        blocks = [nn.Sequential(block, Repeat()) for block in blocks]
    x, counts = torch.randn(shape, requires_grad=True), []
    for cls in (revlib.CoupledSequential, revlib.ReversibleSequential):
        with FlopCounterMode(display=False) as flops:
            cls(*blocks, coupling=coupling)(x).sum().backward()
        counts.append(flops.get_total_flops())
    assert counts[1] <= 1.334 * counts[0]


@pytest.mark.parametrize("stored", [0, 1, 3, 6])
def test_a_stored_block_is_not_run_again(stored: int) -> None:
    x, counts = torch.randn(64, 64, requires_grad=True), []
    stack = revlib.ReversibleSequential(*[mlp(32) for _ in range(6)], store_last=stored)
    for one in (revlib.CoupledSequential(*stack), stack):
        with FlopCounterMode(display=False) as flops:
            one(x).sum().backward()
        counts.append(flops.get_total_flops())
    assert counts[1] / counts[0] == pytest.approx((4 - stored / 6) / 3, rel=1e-12)


def test_treatments_hold_what_they_say() -> None:
    x, held = torch.randn(128, 128, requires_grad=True), {}
    for name in ("reversible", "checkpoint", "store"):
        stack = revlib.ReversibleSequential(*[mlp(64) for _ in range(8)], treatments=[name] * 8)
        held[name] = measure(stack, x)[0]
    assert held["reversible"] == pytest.approx(1, rel=0.01)
    # The output, and each block's input, half as large; the first one's is a view of x.
    assert held["checkpoint"] == pytest.approx(1 + 7 / 2, rel=0.01)
    assert held["store"] > 30


class Repeat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x), 1)


@pytest.mark.parametrize("split_dim", [1, None])
@pytest.mark.parametrize("coupling", [name for name, cls in revlib.COUPLINGS.items() if not cls.needs_grid])
def test_gradcheck_and_gradgradcheck(coupling: str, split_dim: int | None) -> None:
    width = revlib.get_coupling(coupling).branch_shape(torch.Size([2, 3]))[1]
    blocks = [nn.Sequential(nn.Linear(3, width), nn.Tanh()) for _ in range(3)]
    stack = revlib.ReversibleSequential(*blocks, coupling=coupling, split_dim=split_dim).double()
    x = torch.randn(2, 6 if split_dim else 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stack, (x,))
    assert torch.autograd.gradgradcheck(stack, (x,))


class WithLoss(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.tanh(), x.sigmoid().mean()


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Tape]]]:
    """All tapes made; cycles are not collected, since what has to be collected is a leak."""
    made: list[weakref.ref[Tape]] = []
    init = Tape.__init__

    def spy(self: Tape, *args: object) -> None:
        made.append(weakref.ref(self))
        init(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Tape, "__init__", spy)
    gc.disable()
    yield made
    gc.enable()


def test_nothing_outlives_the_graph(tapes: list[weakref.ref[Tape]]) -> None:
    blocks = [mlp(4), noisy(4), nn.Identity(), nn.Tanh(), WithLoss()]
    whole, x = revlib.ReversibleSequential(*blocks), torch.randn(2, 8, requires_grad=True)

    def stack(x: Tensor) -> Tensor:
        y, extras = whole(x)
        return y + extras[-1][0]

    y = stack(x)
    y.sum().backward()
    del y
    stack(x)
    y = stack(x)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
        y.sum().backward()
    del y
    assert [tape() for tape in tapes] == [None] * 3


def test_nothing_outlives_a_forward_that_fails(tapes: list[weakref.ref[Tape]]) -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise MemoryError

    try:
        revlib.ReversibleSequential(WithLoss(), Fails())(torch.randn(2, 8, requires_grad=True))
    except MemoryError:
        pass
    gc.collect()  # a traceback makes cycles that Python sees; those through the graph it does not
    assert [tape() for tape in tapes] == [None]


def test_memory_falls_while_a_block_is_differentiated() -> None:
    live: list[int] = []
    meter = revlib.MemoryMeter()

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            live.append(meter.live)
            return grad

    class Probed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(6)])

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = Probe.apply(part(x))
            return x

    with meter:
        revlib.ReversibleSequential(Probed())(torch.randn(256, 16)).sum().backward()
    assert live[1:] == sorted(live[1:], reverse=True)
    assert live[-1] < live[1]


class Fickle(nn.Module):
    """Saves more tensors each time it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(next(self.calls)):
            x = self.layer(x).tanh()
        return x


def test_a_block_that_is_not_repeatable_is_named() -> None:
    stack = revlib.ReversibleSequential(nn.Linear(4, 4), Fickle())
    with pytest.raises(RuntimeError, match=r"stack\.1 \(Fickle\) computes something else in backward"):
        stack(torch.randn(2, 8)).sum().backward()


class ChangesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@pytest.mark.parametrize("cls", [revlib.CoupledSequential, revlib.ReversibleSequential])
def test_a_block_that_changes_its_input_in_place_is_named(cls: type[nn.Module]) -> None:
    with pytest.raises(RuntimeError, match=r"stack\.1 \(ChangesItsInput\) changes its input in place"):
        cls(nn.Linear(4, 4), ChangesItsInput())(torch.randn(2, 8))


class SpoilsItsOwn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()
        y.add_(1)
        return y


@pytest.mark.parametrize("cls", [revlib.CoupledSequential, revlib.ReversibleSequential])
def test_what_autograd_refuses_is_refused(cls: type[nn.Module]) -> None:
    stack = cls(nn.Linear(4, 4), SpoilsItsOwn())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stack(torch.randn(2, 8)).sum().backward()


def test_what_is_saved_is_let_go_at_once_from_the_second_call_on() -> None:
    stack, x, peaks = revlib.ReversibleSequential(*[mlp(32) for _ in range(3)]), torch.randn(512, 64), []
    for _ in range(3):
        with revlib.MemoryMeter() as meter:
            stack(x)
        peaks.append(meter.peak)
    assert peaks[0] > peaks[1] == peaks[2]


class Penalised(nn.Module):
    """Calls autograd in its forward, but at first; with noise, a buffer, or one that counts its calls."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer, self.what, self.penalty = nn.Linear(4, 4).double(), what, False
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64) if what in ("buffer", "count") else None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(nn.functional.dropout(x) if self.what == "noise" else x).square()
        if self.what == "count":
            self.calls += 1
        if not self.penalty:
            return y
        return torch.autograd.grad(y.tanh().sum(), y, create_graph=True)[0] * y


@pytest.mark.parametrize("what", ["", "noise", "buffer", "count"])
def test_a_block_that_begins_to_call_autograd(what: str) -> None:
    blocks = [Penalised(what) for _ in range(3)]
    twins = copy.deepcopy(blocks)
    x = torch.randn(3, 8, dtype=torch.float64)
    found: list[list[Tensor | None]] = []
    for stack in (revlib.CoupledSequential(*twins), revlib.ReversibleSequential(*blocks)):
        for penalty in (False, False, True, False, True):
            for block in stack:
                block.penalty = penalty  # type: ignore[assignment]
            stack.zero_grad()
            torch.manual_seed(1)
            try:
                stack(x).sum().backward()
            except RuntimeError as error:
                assert what == "count" and penalty and "call the stack again" in str(error)
            found.append([p.grad for p in stack.parameters()])
    for number, (theirs, ours) in enumerate(zip(found[:5], found[5:], strict=True)):
        if what == "count" and number == 2:
            assert not any(p is not None for p in ours)
            continue
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_block_of_an_inner_stack_that_begins_to_call_autograd_on_the_outer_block() -> None:
    class Inner(nn.Module):
        outer: tuple[Tensor, Tensor] | None = None

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.BatchNorm1d(2).double()  # has buffers, so that it cannot be run again

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y if self.outer is None else y * torch.autograd.grad(*self.outer, create_graph=True)[0].mean()

    class Outer(nn.Module):
        penalty = False

        def __init__(self, cls: type) -> None:
            super().__init__()
            self.inner, self.layer = Inner(), nn.Linear(4, 4).double()
            self.stack = cls(self.inner)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x).square()
            self.inner.outer = (h.exp().sum(), h) if self.penalty else None
            return self.stack(h)

    x, found = torch.randn(3, 8, dtype=torch.float64), []
    for cls in (revlib.CoupledSequential, revlib.ReversibleSequential):
        torch.manual_seed(0)
        block = Outer(cls)
        stack = cls(block)
        for penalty in (False, True):
            block.penalty = penalty
            block.zero_grad()
            try:
                stack(x).sum().backward()
            except RuntimeError as error:
                assert cls is revlib.ReversibleSequential and "stack.0 (Outer) calls autograd" in str(error)
                stack(x).sum().backward()
        found.append([p.grad for p in block.parameters()])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_parameter_changed_before_backward_is_named() -> None:
    stack = revlib.ReversibleSequential(nn.Linear(4, 4), nn.Linear(4, 4))
    loss = stack(torch.randn(2, 8)).sum()
    with torch.no_grad():
        stack[1].bias.add_(1)  # type: ignore[union-attr, operator]
    with pytest.raises(RuntimeError, match=r"parameter 'bias' of Linear\(.*\) has been modified"):
        loss.backward()


class Shifts(nn.Module):
    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        return (x + by).tanh()


def test_an_argument_changed_before_backward_is_named() -> None:
    stack, by = revlib.ReversibleSequential(Shifts(), Shifts()), torch.ones(4)
    loss = stack(torch.randn(2, 8, requires_grad=True), by).sum()
    by.zero_()
    with pytest.raises(RuntimeError, match=r"an argument of shape \[4\] has been modified in place"):
        loss.backward()


def test_what_changes_between_two_backwards_through_further_outputs() -> None:
    class Two(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return y.tanh(), y.sin()

    stack: Any = revlib.ReversibleSequential(*[Two(64, 64) for _ in range(4)]).double()
    _, extras = stack(torch.randn(64, 128, dtype=torch.float64))
    (last,) = extras[3]
    torch.autograd.grad(last.sum(), list(stack[3].parameters()), retain_graph=True)
    with torch.no_grad():
        stack[2].weight.add_(1)
    with pytest.raises(RuntimeError, match=r"parameter 'weight' of Two.* has been modified in place"):
        extras[0][0].sum().backward()


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint"])
def test_scripted_blocks(treatment: Any) -> None:
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4)]
    blocks = [torch.jit.script(nn.Sequential(*copy.deepcopy(layers))) for _ in range(3)]
    stack, x = revlib.ReversibleSequential(*blocks, treatments=[treatment] * 3), torch.randn(8, 8, requires_grad=True)
    plain = revlib.CoupledSequential(*blocks)
    plain(x).sum().backward()  # they are compiled after it, and what they save changes with that
    for _ in range(3):
        grads = [torch.autograd.grad(each(x).square().sum(), [x, *stack.parameters()]) for each in (stack, plain)]
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True))
    assert {int(count) for name, count in stack.named_buffers() if "num_batches" in name} == {1 + 3 * 2}


def test_a_scripted_block_that_has_not_been_compiled_is_an_error_that_says_so() -> None:
    stack = revlib.ReversibleSequential(torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))))
    with pytest.raises(RuntimeError, match="compiled after its first call with gradients"):
        stack(torch.randn(8, 10)).sum().backward()
    stack(torch.randn(8, 10)).sum().backward()


def test_changing_the_output_in_place_is_refused() -> None:
    y = revlib.ReversibleSequential(nn.Linear(4, 4))(torch.randn(2, 8))
    y.add_(1)
    with pytest.raises(RuntimeError, match="output of a reversible stack has been modified by an inplace operation"):
        y.sum().backward()


def test_backward_can_be_repeated_after_an_error() -> None:
    class Fails(nn.Module):
        fail = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fail:
                raise MemoryError
            return x.tanh()

    stack, x = (
        revlib.ReversibleSequential(nn.Linear(4, 4), Fails(), nn.Linear(4, 4)).double(),
        torch.randn(2, 8).double(),
    )
    x.requires_grad_()
    loss = stack(x).square().sum()
    stack[1].fail = True  # type: ignore[union-attr]
    with pytest.raises(MemoryError):
        loss.backward(retain_graph=True)
    stack[1].fail = False  # type: ignore[union-attr]
    stack.zero_grad()
    x.grad = None
    loss.backward()
    (expected,) = torch.autograd.grad(revlib.CoupledSequential(*stack)(x).square().sum(), x)
    assert x.grad is not None
    assert torch.allclose(x.grad, expected, rtol=1e-12)


def test_autocast_ends_before_backward() -> None:
    seen: list[torch.dtype] = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            seen.append(y.dtype)
            return y

    with torch.autocast("cpu", torch.bfloat16):
        loss = revlib.ReversibleSequential(Watch(), Watch())(torch.randn(2, 8)).sum()
    loss.backward()
    assert seen == [torch.bfloat16] * 4


@pytest.mark.parametrize("change", ["nothing", "autocast", "eval"])
def test_each_frame_is_rewound_once_whatever_has_changed(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    calls = {"replay": 0, "lend": 0}

    def count(cls: type, name: str) -> None:
        original = getattr(cls, name)

        def counted(self: object, *args: object) -> object:
            calls[name] += 1
            return original(self, *args)

        monkeypatch.setattr(cls, name, counted)

    count(Frame, "replay")
    count(Settings, "lend")
    stack = revlib.ReversibleSequential(*[mlp(4) for _ in range(20)])
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        loss = stack(torch.randn(2, 8)).sum()
    stack.train(change != "eval")
    loss.backward()
    assert calls == {"replay": 20, "lend": 20 if change == "eval" else 0}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"overlap": True},
        {"on_drift": "ignore"},
        *[{"treatments": [t] * 3} for t in ("offload", "checkpoint", "selective")],
    ],
    ids=str,
)
@pytest.mark.parametrize("what", ["model", "stack", "block"])
def test_compile_gives_the_same_gradients_and_compiles_once(what: str, options: dict[str, Any], device: Device) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 4)) for _ in range(3)]
    x, results = torch.randn(5, 8), []
    for cls, compiled in ((revlib.CoupledSequential, False), (revlib.ReversibleSequential, True)):
        model = nn.Sequential(nn.Linear(8, 8), cls(*copy.deepcopy(body), **options), nn.Tanh())
        model[0].load_state_dict(results[0][1]) if results else None
        start, run = copy.deepcopy(model[0].state_dict()), model
        if compiled and what == "model":
            run = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
        for part in {"stack": [model[1]], "block": list(model[1])}.get(what, []) if compiled else []:
            part.compile(backend="aot_eager")
        for step in range(3):
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                model.zero_grad()
                run(x).square().sum().backward()
        results.append(([p.grad for p in model.parameters()], start, model[1].state_dict()))
    for expected, got in zip(results[0][0], results[1][0], strict=True):
        assert torch.allclose(expected, got, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    assert all(torch.allclose(v, results[1][2][k]) for k, v in results[0][2].items())
