from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import lightning_revlib as revlib
from tests.nn.stacks.looping_model import close, gradients, stored


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(hidden).chunk(3, -1)
        weights = (q @ k.mT + (0 if mask is None else mask)).softmax(-1)
        return self.out(weights @ v), weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(8), Attention(), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Dropout(0.1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)[0]
        return x + self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.layers = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, mask=mask)
        return x.square().sum()


def by_function(block: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return block.attention(block.norm1(x), mask)[0]


COUPLINGS: list[Any] = ["additive", {"name": "momentum", "gamma": 0.8}, ["midpoint", "leapfrog"]]
NAMES = [["norm1", "attention"], ["norm2", "mlp"]]


@pytest.mark.parametrize("branches", [NAMES, [by_function, ["feed_forward"]]], ids=["names", "function, method"])
@pytest.mark.parametrize(
    "coupling", ["additive", {"name": "momentum", "gamma": 0.8}, ["midpoint", "leapfrog"]], ids=str
)
def test_branches_are_steps(coupling: Any, branches: Any) -> None:
    model, args = Model().double(), (torch.randn(2, 5, 8).double(), torch.randn(5, 5).double())
    revlib.swap(model, {"layers": {"coupling": coupling, "branches": branches}})
    close(gradients(model, *args), gradients(stored(model), *args))
    assert model.layers.drift is not None
    revlib.restore(model)
    stack = nn.Sequential(*model.layers)
    revlib.swap(stack, {"": {"coupling": coupling, "branches": branches, "split_dim": None}})
    y = stack(args[0], mask=args[1])
    twin = copy.deepcopy(stack)
    revlib.swap(twin, {"": {"store_last": 4}})
    torch.manual_seed(1)
    y = stack(args[0], mask=args[1]).square().sum()
    torch.manual_seed(1)
    z = twin(args[0], mask=args[1]).square().sum()
    y.backward(), z.backward()
    close([p.grad for p in stack.parameters()], [p.grad for p in twin.parameters()])  # type: ignore[misc]


def test_without_coupling_they_are_the_block() -> None:
    model = Model().double().eval()
    x, mask = torch.randn(2, 5, 8).double(), torch.randn(5, 5).double()
    expected = model(x, mask)
    revlib.swap(model, {"layers": {"coupling": {"name": "momentum", "gamma": 0.0}, "branches": NAMES}})
    assert torch.allclose(model(x, mask), expected, rtol=1e-12)


def test_a_branch_needs_less_memory_than_a_block() -> None:
    def peak(**options: Any) -> int:
        model, x, mask = Model(), torch.randn(1024, 5, 8), torch.zeros(5, 5)
        revlib.swap(model, {"layers": {"coupling": "midpoint", **options}})
        with revlib.MemoryMeter() as meter:
            model(x, mask).backward()
        return meter.peak

    assert peak(branches=NAMES) < 0.8 * peak(residual=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": NAMES, "residual": True}, "branches with residual=True"),
        ({"branches": [["norm1", "atention"]]}, r"block 0 \(Block\) has no 'atention'; it has \['attention'\]"),
        ({"branches": ["norm1", "attention"]}, "'norm1' is no list of names"),
        ({"branches": []}, r"branches=\[\]: name the parts of each branch"),
    ],
)
def test_wrong_branches(options: Any, message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=f"target 'layers': .*{message}"):
        revlib.swap(model, {"layers": options})
    assert type(model.layers) is nn.ModuleList


def test_report_counts_branches_as_steps() -> None:
    args = torch.randn(2, 5, 8), torch.randn(5, 5)
    found = revlib.report(Model(), *args, targets={"layers": {"coupling": "additive", "branches": NAMES}})
    assert [stack.steps for stack in found.stacks] == [8]


class Normalized(nn.Module):
    """Its second branch changes buffers, and moves a parameter without gradient that the first one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = spectral_norm(nn.Linear(8, 8))
        self.scale = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.read(x)
        return x + self.move(x)

    def read(self, x: Tensor) -> Tensor:
        return self.first(x).tanh() * self.scale.clone()

    def move(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(0.9)
        return self.second(x).sin()


def first(block: Any, x: Tensor) -> Tensor:
    return block.read(x)


class Layers(nn.Module):
    def __init__(self, branches: Any, treatment: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [Normalized() for _ in range(3)]
        options = {"branches": branches, "treatments": [treatment] * 3, "coupling": "midpoint"}
        self.layers = revlib.ReversibleModuleList(blocks, **options).double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint", "selective"])
@pytest.mark.parametrize("cls", [Layers, revlib.ReversibleSequential])
@pytest.mark.parametrize("branches", [[["read"], ["move"]], [["first"], ["second"]], [first, ["move"]]])
def test_a_branch_that_changes_what_another_has_read(branches: Any, cls: Any, treatment: str) -> None:
    x, found = torch.randn(4, 16).double().requires_grad_(), []
    for each in ("store", treatment):
        torch.manual_seed(0)
        if cls is Layers:
            model: nn.Module = Layers(branches, each)
        else:
            model = cls(*[Normalized() for _ in range(3)], branches=branches, treatments=[each] * 3).double()
        losses = [model(x[:, :8] if cls is Layers else x).square().sum() for _ in range(2)]
        grads = torch.autograd.grad(losses[0] + losses[1], [x, *[p for p in model.parameters() if p.requires_grad]])
        found.append([*grads, *model.buffers(), *model.parameters()])
    assert all(map(torch.allclose, *found))


def test_an_argument_with_the_name_of_a_parts_first_parameter() -> None:
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, context: Tensor) -> Tensor:
            return self.linear(context).tanh()  # type: ignore[no-any-return]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.other = Mlp(), nn.Linear(4, 4)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            x = x + self.add(x, context)
            return x + self.mlp(x)  # type: ignore[no-any-return]

        def add(self, x: Tensor, context: Tensor) -> Tensor:
            return self.other(x) + context  # type: ignore[no-any-return]

    block, x, context = Block(), torch.randn(3, 4), torch.randn(3, 4)
    stack = revlib.ReversibleSequential(
        block, branches=[["add"], ["mlp"]], split_dim=None, coupling={"name": "momentum", "gamma": 0.0}
    )
    torch.testing.assert_close(stack(x, context), block(x, context))
