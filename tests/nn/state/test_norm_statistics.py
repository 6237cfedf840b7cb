"""Running statistics of norms, updated once a step and the same as in forward when a block runs again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.nn.state.twins import TREATMENTS, Masked, sample, twins


def test_batch_norm_counts_one_update_a_step() -> None:
    stack = revlib.ReversibleSequential(*[nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)) for _ in range(3)])
    stack(torch.randn(8, 8)).sum().backward()
    assert [int(block[0].num_batches_tracked) for block in stack] == [1, 1, 1]  # type: ignore[index, arg-type]


def test_batch_norm_buffers_are_the_same_objects_after_backward() -> None:
    stack = revlib.ReversibleSequential(nn.BatchNorm1d(4))
    before = [id(b) for b in stack.buffers()]
    stack(torch.randn(8, 8, requires_grad=True)).sum().backward()
    assert [id(b) for b in stack.buffers()] == before


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
    """Read the statistics in training, as batch renormalisation does."""
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


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_batch_norm_in_evaluation_that_then_trains(treatment: Any) -> None:
    stack, _ = twins(lambda: nn.BatchNorm1d(4).double(), treatment)
    x = sample()
    y = stack.eval()(x).sum()
    stack.train()(x)
    with pytest.raises(RuntimeError, match=r"buffer 'num_batches_tracked' of BatchNorm1d\("):
        y.backward()


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_batch_norm_in_evaluation_whose_statistics_are_loaded_anew(treatment: Any) -> None:
    stack, plain = twins(lambda: nn.BatchNorm1d(4).double(), treatment)
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
    stack, plain = twins(lambda: Sets(kind, training, passing), treatment)
    x = torch.randn(8, 8, 4, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        (expected,) = torch.autograd.grad(plain.train(not training)(x).square().sum(), x)
        (grad,) = torch.autograd.grad(stack.train(not training)(x).square().sum(), x)
        assert torch.allclose(grad, expected, rtol=1e-12)
        for b, other in zip(stack.buffers(), plain.buffers(), strict=True):
            assert torch.allclose(b, other, rtol=1e-12)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_flags_that_a_block_sets_for_a_while_are_as_they_were(treatment: Any) -> None:
    stack, _ = twins(lambda: Sets(nn.BatchNorm1d, training=False, passing=True), treatment)
    stack(sample()).sum().backward()
    assert all(b.norm.training for b in stack)  # type: ignore[union-attr]


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
    for module in twins(lambda: nn.BatchNorm1d(4, dtype=torch.float64), "reversible"):  # leaves others to write into
        module(sample()).square().sum().backward()
    revlib.ReversibleSequential(hooked(0.0))(sample()).sum().backward()  # one whose statistics do not change
    stack, plain = twins(make, treatment)
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

    stack, plain = twins(make, treatment)
    for module in (stack, plain):
        torch.manual_seed(0)
        module(sample()).sum().backward()
    for b, other in zip(stack.buffers(), plain.buffers(), strict=True):
        assert torch.allclose(b, other, rtol=1e-12)


def test_a_stack_in_evaluation_holds_no_copies_of_statistics() -> None:
    stack = revlib.ReversibleSequential(*[nn.BatchNorm1d(4096) for _ in range(4)], on_drift="ignore").eval()
    x = torch.randn(2, 8192, requires_grad=True)
    with revlib.MemoryMeter() as meter:
        y = stack(x)
        assert meter.live == y.nbytes
