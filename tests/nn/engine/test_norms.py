"""Gradients of blocks that use what a norm puts out in one of many ways, changed in place or not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_revlib as revlib

WIDTH = 8


class Block(nn.Module):
    """Uses a normalised input in one of many ways."""

    def __init__(self, norm: nn.Module, use: str) -> None:
        super().__init__()
        self.norm, self.use = norm, use
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.inner = revlib.ReversibleSequential(*[pre_norm(WIDTH // 2) for _ in range(2)], split_dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return (USES | FOR_LAYER_NORM)[self.use](self, x)

    def in_complex_numbers(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = torch.view_as_complex(y.view(*y.shape[:-1], WIDTH // 2, 2))
        return self.q(y) + torch.view_as_real(z * torch.polar(self.q.bias[:4].abs(), self.k.bias[:4])).flatten(-2)

    def in_inference(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            z = self.norm(x.detach())
        return self.q(z.clone()) + self.k(self.norm(x))

    def in_autograd(self, x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(self.q(self.norm(x)).square().sum(), x, create_graph=True)
        return g

    def of_a_call(self, x: Tensor) -> Tensor:
        weight = self.k(x.mean((0, 1)))
        return self.q(torch.func.functional_call(self.norm, {"weight": weight}, (x,)))

    def saved(self, x: Tensor) -> Tensor:
        z = (y := self.norm(x)) + 0
        return self.q(y) + z.sin_()

    def transposed(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.q(y.transpose(0, 1).contiguous().transpose(0, 1)) + y.transpose(0, 1).sin().transpose(0, 1)


USES: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "plain": lambda m, x: m.q(m.norm(x)),
    "shared": lambda m, x: m.q(y := m.norm(x)) * torch.tanh(m.k(y)) + m.v(y),
    "in place": lambda m, x: m.q(m.norm(x).mul_(2)),
    "saved, then changed": Block.saved,
    "twice": lambda m, x: m.q(m.norm(m.k(m.norm(x)))),
    "returned": lambda m, x: m.norm(x),
    "transposed": Block.transposed,
    "stack": lambda m, x: m.inner(m.norm(x)),
    "checkpoint": lambda m, x: checkpoint(lambda x: m.q(m.norm(x)), x, use_reentrant=False),
    "autograd": Block.in_autograd,
    "dropout": lambda m, x: m.q(nn.functional.dropout(m.norm(x))),
    "inference": Block.in_inference,
    "complex": Block.in_complex_numbers,
}
FOR_LAYER_NORM: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "by name": lambda m, x: m.q(m.norm(input=x)),
    "weight of the call": Block.of_a_call,
    "vmap": lambda m, x: torch.vmap(lambda x: m.q(m.norm(x)))(x),
}


def pre_norm(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def with_buffer(norm: nn.Module) -> nn.Module:
    del norm.weight
    norm.register_buffer("weight", torch.randn(WIDTH))
    return norm


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "without parameters": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "GroupNorm": lambda: nn.Sequential(nn.Flatten(0, 1), nn.GroupNorm(2, WIDTH), nn.Unflatten(0, (3, 5))),
    "buffer": lambda: with_buffer(nn.LayerNorm(WIDTH)),
    "frozen": lambda: nn.LayerNorm(WIDTH).requires_grad_(False),
}


def gradients(stack: nn.Module, x: Tensor, backwards: int = 1) -> list[Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    loss = stack(x).square().sum()
    for _ in range(backwards):
        loss.backward(retain_graph=True)
    return [x.grad, *[p.grad for p in stack.parameters() if p.grad is not None]]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("norm", "use"),
    [(norm, use) for norm in NORMS for use in USES] + [("LayerNorm", use) for use in FOR_LAYER_NORM],
)
def test_gradients_are_those_of_autograd(norm: str, use: str) -> None:
    torch.manual_seed(0)
    blocks = [Block(NORMS[norm](), use).double() for _ in range(3)]
    x = torch.randn(3, 5, 2 * WIDTH, dtype=torch.float64)
    expected = gradients(revlib.CoupledSequential(*copy.deepcopy(blocks), split_dim=-1), x, 2)
    found = gradients(revlib.ReversibleSequential(*blocks, split_dim=-1), x, 2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert not any("forward" in m.__dict__ for block in blocks for m in block.modules())


def test_second_derivatives_and_hooks_of_norms() -> None:
    torch.manual_seed(0)
    blocks = [pre_norm(WIDTH).double() for _ in range(3)]
    stack = revlib.ReversibleSequential(*blocks)
    x = torch.randn(4, 2 * WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(stack, x)
    calls = []
    blocks[0][0].register_forward_hook(lambda *args: calls.append(1))  # type: ignore[index]
    stack(x).sum().backward()
    assert len(calls) == 2


def test_parameters_of_a_functional_call() -> None:
    torch.manual_seed(0)
    stack = revlib.ReversibleSequential(*[pre_norm(WIDTH).double() for _ in range(2)])
    plain = revlib.CoupledSequential(*copy.deepcopy(list(stack)))
    x = torch.randn(4, 2 * WIDTH, dtype=torch.float64)
    other = {name: torch.randn_like(p) for name, p in stack.named_parameters()}
    results = []
    for model in (plain, stack):
        mine = {name: p.clone().requires_grad_() for name, p in other.items()}
        torch.func.functional_call(model, mine, x).square().sum().backward()
        results.append([p.grad for p in mine.values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
