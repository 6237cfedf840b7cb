"""What blocks read or change besides parameters: buffers, and numbers among their attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from lightning_revlib.nn.state.buffers import Buffers
from lightning_revlib.nn.state.norm_statistics import SCRATCH

TREATMENTS = ["reversible", "checkpoint", "selective"]


class Masked(nn.Module):
    """Adds a mask, which ordinary autograd need not save, and multiplies by a scale, absent at first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.randn(4, dtype=torch.float64))
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        out = (x + self.mask).tanh()  # type: ignore[operator]
        return out if self.scale is None else out * self.scale


def stacks(make: Callable[[], nn.Module], treatment: Any) -> tuple[nn.Module, nn.Module]:
    made = []
    for _ in range(2):  # lazy modules cannot be copied
        torch.manual_seed(0)
        made.append([make() for _ in range(3)])
    return revlib.ReversibleSequential(*made[0], treatments=[treatment] * 3), revlib.CoupledSequential(*made[1])


def sample() -> Tensor:
    return torch.randn(8, 8, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_buffers_of_a_functional_call(treatment: Any) -> None:
    stack, plain = stacks(Masked, treatment)
    x, other = sample(), {name: torch.randn_like(b) for name, b in stack.named_buffers()}
    (expected,) = torch.autograd.grad(torch.func.functional_call(plain, other, x).square().sum(), x)
    before = [id(b) for b in stack.buffers()]
    (grad,) = torch.autograd.grad(torch.func.functional_call(stack, other, x).square().sum(), x)
    assert torch.allclose(grad, expected, rtol=1e-12)
    assert [id(b) for b in stack.buffers()] == before


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("how", ["assigned", "registered", "deleted", "None", "set", "moved"])
def test_buffers_exchanged_between_forward_and_backward(how: str, treatment: Any) -> None:
    stack, plain = stacks(Masked, treatment)
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
    stack, _ = stacks(Masked, treatment)
    y = stack(sample()).sum()
    with torch.no_grad():
        stack[1].mask.add_(1)  # type: ignore[index, operator]
    stack.eval()  # settings to be lent and put back
    with pytest.raises(RuntimeError, match=r"buffer 'mask' of Masked\(\) has been modified in place since the forward"):
        y.backward()
    assert not any(m.training for m in stack.modules())


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_batch_norm_in_evaluation_that_then_trains(treatment: Any) -> None:
    stack, _ = stacks(lambda: nn.BatchNorm1d(4).double(), treatment)
    x = sample()
    y = stack.eval()(x).sum()
    stack.train()(x)
    with pytest.raises(RuntimeError, match=r"buffer 'num_batches_tracked' of BatchNorm1d\("):
        y.backward()


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_batch_norm_in_evaluation_whose_statistics_are_loaded_anew(treatment: Any) -> None:
    stack, plain = stacks(lambda: nn.BatchNorm1d(4).double(), treatment)
    x = sample()
    stack.eval(), plain.eval()
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    y = stack(x).square().sum()
    state = {
        name: t + 1 if t.is_floating_point() and "running" in name else t for name, t in stack.state_dict().items()
    }
    stack.load_state_dict(state, assign=True)
    for name, p in stack.named_parameters():
        p.data = plain.get_parameter(name).data
    assert torch.allclose(torch.autograd.grad(y, x)[0], expected, rtol=1e-12)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_two_forwards_meet_buffers_of_their_own_in_backward(treatment: Any) -> None:
    stack, plain = stacks(Masked, treatment)
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


class Sets(nn.Module):
    """Sets its norm's training itself, and back again if it is a passing mood."""

    def __init__(self, kind: type[nn.Module], training: bool, passing: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)
        self.norm = kind(4, track_running_stats=True, dtype=torch.float64)
        self.norm.running_mean.normal_()  # type: ignore[union-attr, operator]
        self.set, self.passing = training, passing

    def forward(self, x: Tensor) -> Tensor:
        before = self.norm.training
        self.norm.train(self.set)
        out = self.norm(self.linear(x).tanh())
        if self.passing:
            self.norm.train(before)
        return out  # type: ignore[no-any-return]


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
@pytest.mark.parametrize("passing", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_block_that_sets_the_training_of_its_norm(
    training: bool, passing: bool, kind: type[nn.Module], treatment: Any
) -> None:
    if kind is nn.InstanceNorm1d and passing and training:
        pytest.skip("an instance norm does not tell in which mode it was called, and its statistics count twice")
    stack, plain = stacks(lambda: Sets(kind, training, passing), treatment)
    x = torch.randn(8, 8, 4, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        (expected,) = torch.autograd.grad(plain.train(not training)(x).square().sum(), x)
        (grad,) = torch.autograd.grad(stack.train(not training)(x).square().sum(), x)
        assert torch.allclose(grad, expected, rtol=1e-12)
        for b, other in zip(stack.buffers(), plain.buffers(), strict=True):
            assert torch.allclose(b, other, rtol=1e-12)


def test_what_statistics_are_lent_is_written_by_the_second_runs_of_all_steps() -> None:
    stack, _ = stacks(lambda: nn.BatchNorm1d(4, dtype=torch.float64), "reversible")
    made: list[int] = []
    for _ in range(3):
        stack(sample()).sum().backward()
        made.append(len(SCRATCH))
    assert made[0] == made[2]


def arranged(how: str) -> list[nn.Module]:
    """Three blocks with batch norms: a block's own, shared, of a block that runs twice, partly in evaluation."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm1d(4) for _ in range(3)]
    if how == "one norm in all":
        norms = norms[:1] * 3
    layers = [nn.Sequential(nn.Linear(4, 4), norm, nn.Tanh(), nn.BatchNorm1d(4), Masked()).double() for norm in norms]
    if how == "one in evaluation":
        layers[1][1].eval()
    return [layers[0], layers[0], layers[2]] if how == "a block twice" else [*layers]


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("how", ["its own", "one norm in all", "a block twice", "one in evaluation"])
def test_statistics_are_updated_once_however_norms_are_arranged(how: str, treatment: Any) -> None:
    stack = revlib.ReversibleSequential(*arranged(how), treatments=[treatment] * 3)
    plain, x = revlib.CoupledSequential(*arranged(how)), sample()
    for _ in range(3):  # the first call learns what the others need not look for
        grads = [torch.autograd.grad(each(x).square().sum(), [x, *each.parameters()]) for each in (stack, plain)]
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*grads, strict=True))
        for b, other in zip(stack.buffers(), plain.buffers(), strict=True):
            assert torch.allclose(b, other, rtol=1e-12)


class Hands(nn.Module):
    """Hands its norm's statistics to a function itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4, dtype=torch.float64), nn.BatchNorm1d(4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        return nn.functional.batch_norm(
            self.linear(x), n.running_mean, n.running_var, n.weight, n.bias, n.training, 0.1, n.eps
        )


def hooked(momentum: float) -> nn.Module:
    norm = nn.BatchNorm1d(4, momentum=momentum, dtype=torch.float64)
    norm.register_forward_hook(lambda *_: None)
    return norm


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), nn.LazyBatchNorm1d(dtype=torch.float64), nn.Tanh())


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("make", [Hands, lazy, lambda: hooked(0.1)], ids=["hands", "lazy", "hooked"])
def test_statistics_in_unusual_hands(make: Callable[[], nn.Module], training: bool, treatment: Any) -> None:
    for module in stacks(lambda: nn.BatchNorm1d(4, dtype=torch.float64), "reversible"):  # leaves others to write into
        module(sample()).square().sum().backward()
    revlib.ReversibleSequential(hooked(0.0))(sample()).sum().backward()  # one whose statistics do not change
    stack, plain = stacks(make, treatment)
    x = sample()
    for _ in range(2):
        (expected,) = torch.autograd.grad(plain.train(training)(x).square().sum(), x)
        (grad,) = torch.autograd.grad(stack.train(training)(x).square().sum(), x)
        assert torch.allclose(grad, expected, rtol=1e-12)
        for b, other in zip(stack.buffers(), plain.buffers(), strict=True):
            assert torch.allclose(b, other, rtol=1e-12)


def test_norms_of_two_kinds_and_one_shape() -> None:
    norms = [nn.InstanceNorm1d(4, track_running_stats=True), nn.BatchNorm1d(4)] * 2
    stack = revlib.ReversibleSequential(*[nn.Sequential(norm, nn.Tanh()) for norm in norms]).double()
    x = torch.randn(8, 8, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(revlib.CoupledSequential(*stack)(x).square().sum(), x)
    (grad,) = torch.autograd.grad(stack(x).square().sum(), x)
    assert torch.allclose(grad, expected, rtol=1e-12)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_batch_norm_without_a_counter_of_batches(treatment: Any) -> None:
    def make() -> nn.Module:
        norm = nn.BatchNorm1d(4, dtype=torch.float64)
        norm.num_batches_tracked = None
        return norm

    stack, plain = stacks(make, treatment)
    for module in (stack, plain):
        torch.manual_seed(0)
        module(sample()).sum().backward()
    for b, other in zip(stack.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(b, other, rtol=1e-12)


def test_statistics_of_a_batch_norm_in_evaluation_are_not_copied() -> None:
    buffers = Buffers([nn.BatchNorm1d(4).eval()])
    assert not buffers.changing
    assert buffers.close() and len(buffers.read) == 3


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
    stack, plain = stacks(Caches, treatment)
    x = sample()
    for _ in range(2):
        (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
        assert torch.allclose(torch.autograd.grad(stack(x).square().sum(), x)[0], expected, rtol=1e-12)


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
    count = torch.ones((), dtype=torch.float64)
    stack = revlib.ReversibleSequential(Counts(count, False), Counts(count, True), treatments=[treatment] * 2)
    with pytest.raises(RuntimeError, match=r"buffer 'count' of Counts\(\) has been modified in place"):
        stack(sample()).sum().backward()


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_table_that_a_block_makes_anew_for_a_longer_input(treatment: Any) -> None:
    stack, plain = stacks(Caches, treatment)
    for length in (4, 8, 6, 8):
        x = torch.randn(length, 8, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
        assert torch.allclose(torch.autograd.grad(stack(x).square().sum(), x)[0], expected, rtol=1e-12)
        assert all(m.length == len(m.table) == max(length, 4 if length == 4 else 8) for m in stack)


class Schedule(nn.Module):
    """Counts its calls, within and behind another module, and depends on the number."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.rate = 0, 0.5
        self.inner = nn.Tanh()
        self.inner.calls = 0  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.rate, self.inner.calls = self.calls + 1, self.rate * 0.9, self.inner.calls + 2  # type: ignore[assignment, operator]
        return self.inner(x * self.rate * self.inner.calls) + x / self.calls


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_blocks_that_count_their_calls(treatment: Any) -> None:
    stack, plain = stacks(Schedule, treatment)
    x = sample()
    for calls in (1, 2, 3):
        (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
        assert torch.allclose(torch.autograd.grad(stack(x).square().sum(), x)[0], expected, rtol=1e-9)
        assert all((m.calls, m.inner.calls) == (calls, 2 * calls) for m in stack)  # once a step, as in plain
    expected = torch.autograd.grad(plain(x).sum() * plain(x).sum(), x)[0]  # two forwards, then backward
    assert torch.allclose(torch.autograd.grad(stack(x).sum() * stack(x).sum(), x)[0], expected, rtol=1e-9)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_what_is_learnt_in_evaluation_is_learnt_anew_in_training(treatment: Any) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(4, 4, dtype=torch.float64), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            return self.linear(x).tanh() * (1 + self.calls)  # type: ignore[no-any-return]

    stack, plain = stacks(Counts, treatment)
    x = sample()
    for training in (False, True, True):
        (expected,) = torch.autograd.grad(plain.train(training)(x).square().sum(), x)
        (grad,) = torch.autograd.grad(stack.train(training)(x).square().sum(), x)
        assert torch.allclose(grad, expected, rtol=1e-12)
        assert [b.calls for b in stack] == [b.calls for b in plain]  # type: ignore[attr-defined]


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_flags_that_a_block_sets_for_a_while_are_as_they_were(treatment: Any) -> None:
    stack, _ = stacks(lambda: Sets(nn.BatchNorm1d, training=False, passing=True), treatment)
    stack(sample()).sum().backward()
    assert all(b.norm.training for b in stack)  # type: ignore[union-attr]


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
    stack, plain = stacks(Quantizes, treatment)
    x = sample()
    for _ in range(2):
        expected, grad = (torch.autograd.grad(m(x).square().sum(), [x, *m.parameters()]) for m in (plain, stack))
        assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(grad, expected, strict=True))
        for b, other in zip(stack.buffers(), plain.buffers(), strict=True):
            assert torch.allclose(b, other, rtol=1e-12)


class Draws(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.linear, self.generator = nn.Linear(4, 4, dtype=torch.float64), generator

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * torch.rand(x.shape, generator=self.generator, dtype=x.dtype)  # type: ignore[no-any-return]


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_blocks_that_draw_from_generators_of_their_own(treatment: Any) -> None:
    torch.manual_seed(0)
    x, found = sample(), []
    for kind in (revlib.ReversibleSequential, revlib.CoupledSequential):
        torch.manual_seed(0)
        shared, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        stack = kind(Draws(shared), Draws(own), Draws(shared), treatments=[treatment] * 3)
        found.append([])
        for _ in range(2):
            y = stack(x).square().sum()
            torch.rand(1, generator=shared)
            found[-1] += torch.autograd.grad(y, [x, *stack.parameters()])
        found[-1] += [shared.get_state(), own.get_state()]
    for grad, expected in zip(*found, strict=True):
        assert torch.allclose(grad, expected, rtol=1e-12)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_numbers_are_looked_at_in_the_first_forward_only_if_none_change(treatment: Any) -> None:
    stack, _ = stacks(nn.Tanh, treatment)
    assert stack._counts is None
    stack(sample())
    assert stack._counts is False
    assert not Buffers([Schedule()], numbers=False).numbers
