from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import lightning_revlib as revlib


def test_space_to_depth_moves_patches_into_channels_and_back() -> None:
    x = torch.arange(32.0).view(1, 2, 4, 4)
    psi = revlib.SpaceToDepth(2)
    assert psi(x).shape == (1, 8, 2, 2)
    assert psi(x)[0, :4, 0, 0].tolist() == [0, 1, 4, 5]
    assert torch.equal(psi.inverse(psi(x)), x)


@pytest.mark.parametrize("shape", [(8, 64, 16, 18), (64, 64, 64), (2, 3, 4, 96, 96), (1, 2, 4, 4)])
def test_space_to_depth_is_pixel_unshuffle_for_any_size(shape: tuple[int, ...]) -> None:
    x, psi = torch.randn(shape, requires_grad=True), revlib.SpaceToDepth(2)
    y = torch.nn.functional.pixel_unshuffle(x, 2)
    assert torch.equal(psi(x), y) and torch.equal(psi.inverse(y), x)
    gradient = torch.randn_like(y)
    assert torch.equal(*[torch.autograd.grad(each, x, gradient)[0] for each in (psi(x), y)])
    if len(shape) == 4:
        kept = x.to(memory_format=torch.channels_last)
        assert torch.equal(psi(kept), y) and psi(kept).is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="divisible"):
        psi.inverse(x.narrow(-3, 0, x.shape[-3] - 1).contiguous())


@pytest.mark.parametrize("coupling", [{"name": "momentum", "gamma": 0.0}, {"name": "scaled", "scale": 0.0}])
def test_before_a_coupling_that_cannot_be_undone(coupling: dict[str, Any]) -> None:
    blocks = [revlib.Permutation(4), *[torch.nn.Linear(4, 4).double() for _ in range(3)]]
    x = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    stacks = [cls(*blocks, coupling=coupling) for cls in (revlib.ReversibleSequential, revlib.CoupledSequential)]
    grads = [torch.autograd.grad(stack(x).square().sum(), [x, *stack.parameters()]) for stack in stacks]
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*grads, strict=True))


class Stretch(nn.Module):
    """An invertible step with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log.exp()

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log).exp()


class ActNorm(Stretch):
    """Takes its scale from the first batch, as Glow's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            with torch.no_grad():
                self.log.copy_(-x.std(0).log())
                self.ready.fill_(True)  # type: ignore[operator]
        return super().forward(x)


class Flagged(Stretch):
    """The same with a flag that is a bool, and a count of calls."""

    ready, calls = False, 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.log.data.copy_(-x.std(0).log())
            self.ready = True
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("step", [ActNorm, Flagged])
def test_state_that_a_step_changes(step: Any) -> None:
    torch.manual_seed(0)
    blocks = [step(), nn.Linear(4, 4).double(), step(), nn.Linear(4, 4).double()]
    x, found = torch.randn(16, 8, dtype=torch.float64), []
    for cls in (revlib.ReversibleSequential, revlib.CoupledSequential):
        stack = cls(*copy.deepcopy(blocks))
        for _ in range(2):
            stack(x).square().sum().backward()
        state = {**stack.state_dict(), "calls": torch.tensor([getattr(m, "calls", 0) for m in stack])}
        found.append([*[p.grad for p in stack.parameters()], *state.values()])
    assert all(torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12) for ours, theirs in zip(*found, strict=True))


class Counts(Stretch):
    """Keeps the sum of its logarithms, and counts its calls in a buffer."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total = self.log.sum()
        return super().forward(x)


@pytest.mark.parametrize("forwards", [1, 2])
def test_what_a_step_keeps_as_attributes_and_buffers(forwards: int) -> None:
    blocks = [Counts(), nn.Linear(4, 4).double(), Counts()]
    x, found = torch.randn(8, 8, dtype=torch.float64), []
    for cls in (revlib.ReversibleSequential, revlib.CoupledSequential):
        stack: Any = cls(*copy.deepcopy(blocks))
        loss = torch.zeros(())
        for _ in range(forwards):
            y = stack(x)
            total = stack[0].total
            total += stack[2].total  # in place
            loss = loss + y.square().sum() + total
        loss.backward()
        found.append([*[p.grad for p in stack.parameters()], stack[0].calls, stack[2].calls])
    assert all(torch.allclose(ours, theirs, rtol=1e-9) for ours, theirs in zip(*found, strict=True))


class Scaled(nn.Module):
    """Reads a buffer, which others may exchange; makes and deletes others."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))
        self.register_buffer("first", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.first = None  # type: ignore[assignment]
        self.register_buffer("seen", x.detach().mean())
        return x * self.scale  # type: ignore[operator]

    def inverse(self, y: Tensor) -> Tensor:
        return y / self.scale  # type: ignore[operator]


@pytest.mark.parametrize("way", ["functional_call", "exchanged"])
def test_buffers_that_others_exchange(way: str) -> None:
    blocks = [Scaled(), nn.Linear(4, 4).double(), Scaled()]
    x, found = torch.randn(8, 8, dtype=torch.float64), []
    for cls in (revlib.ReversibleSequential, revlib.CoupledSequential):
        stack: Any = cls(*copy.deepcopy(blocks))
        if way == "functional_call":
            lent = {"0.scale": torch.tensor(3.0).double(), "2.scale": torch.tensor(5.0).double()}
            loss = torch.func.functional_call(stack, lent, (x,)).square().sum()
        else:
            loss = stack(x).square().sum()
            stack[0].scale = torch.tensor(3.0).double()
        found.append(torch.autograd.grad(loss, list(stack.parameters())))
    assert all(torch.allclose(ours, theirs, rtol=1e-9) for ours, theirs in zip(*found, strict=True))


def test_a_step_with_a_lazy_module() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LazyBatchNorm1d()

        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * self.norm(x)

        def inverse(self, y: Tensor) -> Tensor:
            return y

    stack = revlib.ReversibleSequential(Normed(), nn.Linear(4, 4))
    stack(torch.randn(8, 8)).sum().backward()
    assert stack.drift is not None and stack.drift < 1e-5


def test_contexts_of_a_step_s_runs_are_for_blocks() -> None:
    entered: list[str] = []

    @contextmanager
    def context(name: str) -> Iterator[None]:
        entered.append(name)
        yield

    stack = revlib.ReversibleSequential(
        Stretch(), nn.Linear(4, 4).double(), context_fn=lambda: (context("first"), context("second"))
    )
    stack(torch.randn(8, 8, dtype=torch.float64)).sum().backward()
    assert entered.count("first") == 1


def test_a_step_whose_parameter_was_changed_is_named() -> None:
    stack = revlib.ReversibleSequential(nn.Linear(4, 4).double(), Stretch())
    y = stack(torch.randn(8, 8, dtype=torch.float64))
    with torch.no_grad():
        stack[1].log.add_(1)
    with pytest.raises(RuntimeError, match=r"^stack.1 \(Stretch\): parameter 'log' .* modified in place"):
        y.sum().backward()


def test_an_ordinary_block_with_an_inverse_gets_its_arguments() -> None:
    class Scales(Stretch):
        def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
            return super().forward(x) * by

    stack = revlib.ReversibleSequential(Scales(), nn.Linear(4, 4).double(), ordinary=1, split_dim=None)
    x = torch.randn(8, 4, dtype=torch.float64)
    y, other = (stack(x, layerwise=[((by,), {}), ((), {})]) for by in (2.0, 1.0))
    assert not torch.allclose(y, other)


def test_what_a_step_cannot_get_or_return() -> None:
    class LogDet(Stretch):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.log.sum()

    x = torch.randn(8, 8, dtype=torch.float64)
    for cls in (revlib.ReversibleSequential, revlib.CoupledSequential):
        with pytest.raises(TypeError, match="LogDet is an invertible step, which returns one stream for one"):
            cls(LogDet(), nn.Linear(4, 4).double())(x)
        with pytest.raises(ValueError, match=r"layerwise\[0\]: stack.0 \(Stretch\) is an invertible step"):
            cls(Stretch(), nn.Linear(4, 4).double())(x, layerwise=[((x,), {}), ((), {})])


def test_the_inverse_uses_the_parameters_of_a_functional_call() -> None:
    blocks: list[nn.Module] = [nn.Linear(4, 4).double(), Stretch(), nn.Linear(4, 4).double()]
    x, grads = torch.randn(8, 8, dtype=torch.float64), []
    for cls in (revlib.CoupledSequential, revlib.ReversibleSequential):
        stack = cls(*blocks)
        others = {name: (p.detach() + 0.1).requires_grad_() for name, p in stack.named_parameters()}
        torch.func.functional_call(stack, others, x).square().sum().backward()
        grads.append([p.grad for p in others.values()])
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_orthogonal_stays_orthogonal_under_weight_decay(optimizer: Any) -> None:
    stack = revlib.ReversibleSequential(*[nn.Linear(4, 4), revlib.Orthogonal(4), nn.Linear(4, 4)]).double()
    weight = stack[1].linear.weight.detach()
    decayed = optimizer(stack[1].parameters(), 0.1, weight_decay=0.1)
    for p in stack[1].parameters():
        p.grad = torch.zeros_like(p)
    decayed.step()
    assert torch.allclose(stack[1].linear.weight, weight)
    trained = optimizer(stack.parameters(), 0.1, weight_decay=0.1)
    x = torch.randn(8, 8, dtype=torch.float64)
    for _ in range(10):
        trained.zero_grad()
        stack(x).square().mean().backward()
        trained.step()
    now = stack[1].linear.weight
    assert torch.allclose(now.T @ now, torch.eye(4, dtype=torch.float64)) and not torch.allclose(now, weight)
    assert torch.allclose(stack.inverse(stack(x)), x)


def test_orthogonal_loads_a_parametrization_of_torch() -> None:
    linear = nn.Linear(5, 5, bias=False).double()
    orthogonal(linear, orthogonal_map="householder", use_trivialization=False)
    layer = revlib.Orthogonal(5).double()
    former = {f"linear.{name}": t for name, t in linear.state_dict().items()}
    model = nn.Sequential(layer)
    model.load_state_dict({f"0.{name}": t for name, t in former.items()})
    assert torch.allclose(layer.linear.weight, linear.weight)  # type: ignore[arg-type]
    copied = revlib.Orthogonal(5).double()
    copied.load_state_dict(layer.state_dict())
    assert torch.equal(copied.linear.weight, layer.linear.weight)  # type: ignore[arg-type]


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="block_size=0"):
        revlib.SpaceToDepth(0)
    with pytest.raises(ValueError, match=r"SpaceToDepth\(2\) does not divide an image of \[3, 4\] pixels"):
        revlib.SpaceToDepth(2)(torch.randn(1, 2, 3, 4))
