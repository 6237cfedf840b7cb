"""Conditions on what blocks consist of: layers, in-place operations, autograd inside, nesting, invertible steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lightning_revlib as revlib
from tests.nn.conditions.base import Case, condition


@condition
def mlp(case: Case) -> list[Tensor | None]:
    return case.train(case.mlp())


@condition
def odd_depth(case: Case) -> list[Tensor | None]:
    return case.train(case.mlp(5))


@condition
def one_block(case: Case) -> list[Tensor | None]:
    return case.train(case.mlp(1))


@condition
def chunks(case: Case) -> list[Tensor | None]:
    return case.train(
        case.stack(*[case.block(nn.Linear(case.width, case.width), nn.Tanh()) for _ in range(4)], chunks=[1, 3])
    )


@condition
def bare_linear(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[nn.Linear(case.width, case.out_width) for _ in range(4)]))


class Wide(nn.Module):
    """The identity, repeated where the coupling needs a wider branch; saves nothing, has no parameters."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.times, 1) if self.times > 1 else x


@condition
def identity_between(case: Case) -> list[Tensor | None]:
    wide = Wide(case.out_width // case.width)
    return case.train(case.stack(wide, case.block(nn.Tanh()), wide, case.block(nn.Tanh()), wide))


@condition
def identity_only(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[Wide(case.out_width // case.width) for _ in range(3)]))


@condition
def inplace_inside(case: Case) -> list[Tensor | None]:
    blocks = [case.block(nn.Linear(case.width, case.width), nn.ELU(inplace=True)) for _ in range(3)]
    return case.train(case.stack(*blocks))


class Twice(torch.autograd.Function):
    """x^2 y; its backward asks for its saved tensors twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * x * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2 * ctx.saved_tensors[0] * ctx.saved_tensors[1] * grad, ctx.saved_tensors[0] ** 2 * grad


class UsesTwice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(x, x.tanh())


@condition
def saved_tensors_asked_twice(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(UsesTwice(), nn.Tanh()) for _ in range(3)]))


@condition
def saved_tensors_of_chunks_asked_twice(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(UsesTwice(), nn.Tanh()) for _ in range(3)], chunks=[2, 1]))


class Force(nn.Module):
    """Computes the gradient of a potential by autograd inside the block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.potential = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            position = x if x.requires_grad else x.detach().requires_grad_()
            energy = self.potential(position).tanh().square().sum()
            return torch.autograd.grad(energy, position, create_graph=True)[0]


@condition
def autograd_inside_a_block(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(Force(case.width)) for _ in range(3)]))


class Checkpointed(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.module, x, use_reentrant=False)


@condition
def checkpoint_inside(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[Checkpointed(case.block(nn.Dropout(0.3), nn.Tanh())) for _ in range(3)]))


@condition
def checkpoint_around(case: Case) -> list[Tensor | None]:
    stack, x = case.mlp(), case.input()
    with case.forward_context():
        y = checkpoint(stack, x, use_reentrant=False)
    case.loss(y).backward()
    return [y, x.grad, *case.gradients(stack)]


@condition
def stack_in_a_stack(case: Case) -> list[Tensor | None]:
    def inner() -> nn.Module:
        parts = [nn.Sequential(nn.Linear(case.width // 2, case.width // 2), nn.Tanh()) for _ in range(3)]
        grid = {"grid_bits": 12} if case.exact else {}
        return nn.Sequential(case.cls(*parts, **grid), nn.Dropout(0.3), nn.Linear(case.width, case.out_width))

    return case.train(case.stack(*[inner() for _ in range(3)]))


class Roll(nn.Module):
    """An invertible step: a fixed permutation."""

    exact = True

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, dims=-1)

    def inverse(self, y: Tensor) -> Tensor:
        return y.roll(-1, dims=-1)


class Stretch(nn.Module):
    """An invertible step with a parameter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.linspace(-0.3, 0.3, width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.log.to(x.dtype).exp()

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-self.log.to(y.dtype)).exp()


@condition
def invertible_steps(case: Case) -> list[Tensor | None]:
    middle = Roll() if case.exact else Stretch(case.width)
    return case.train(case.stack(Roll(), case.block(nn.Tanh()), middle, case.block(nn.Tanh()), Roll()))


@condition
def library_invertible_steps(case: Case) -> list[Tensor | None]:
    middle = revlib.Permutation(case.width) if case.exact else revlib.Orthogonal(case.width)
    return case.train(case.stack(revlib.Permutation(case.width), case.block(nn.Tanh()), middle, case.block(nn.Tanh())))
