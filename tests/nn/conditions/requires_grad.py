"""Conditions on what requires grad, and on flags and parameters that change during a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.nn.conditions.base import Case, condition


@condition
def input_without_grad(case: Case) -> list[Tensor | None]:
    return case.train(case.mlp(), case.input(requires_grad=False))


@condition
def frozen_first_blocks(case: Case) -> list[Tensor | None]:
    stack = case.mlp()
    stack[:2].requires_grad_(False)
    return case.train(stack, case.input(requires_grad=False))


@condition
def frozen_middle_block(case: Case) -> list[Tensor | None]:
    stack = case.mlp()
    stack[1].requires_grad_(False)
    return case.train(stack)


@condition
def frozen_all_but_input(case: Case) -> list[Tensor | None]:
    return case.train(case.mlp().requires_grad_(False))


@condition
def nothing_requires_grad(case: Case) -> list[Tensor | None]:
    return case.train(case.mlp().requires_grad_(False), case.input(requires_grad=False))


@condition
def frozen_between_forward_and_backward(case: Case) -> list[Tensor | None]:
    stack, x = case.mlp(), case.input()
    y = case.call(stack, x)
    stack.requires_grad_(False)
    case.loss(y).backward()
    return [y, x.grad, *case.gradients(stack)]


@condition
def eval_between_forward_and_backward(case: Case) -> list[Tensor | None]:
    stack, x = case.stack(*[case.block(nn.Dropout(0.5), nn.BatchNorm1d(case.width)) for _ in range(3)]), case.input()
    y = case.call(stack, x)
    stack.eval()
    case.loss(y).backward()
    assert not any(m.training for m in stack.modules())
    return [y, x.grad, *case.gradients(stack)]


class Settles(nn.Module):
    """Drops out in its first call only, and leaves itself so."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.body, self.dropout = case.block(nn.Tanh()), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(self.dropout(x))
        self.dropout.eval()
        return out


@condition
def flags_that_blocks_change_for_good(case: Case) -> list[Tensor | None]:
    stack = case.stack(*[Settles(case) for _ in range(3)])
    first = case.train(stack)
    assert not any(block.dropout.training for block in stack)  # type: ignore[union-attr]
    return [*first, *case.train(stack)]


@condition
def functional_call(case: Case) -> list[Tensor | None]:
    stack, x = case.mlp(), case.input()
    other = {name: (p.detach() + 0.1).requires_grad_() for name, p in stack.named_parameters()}
    with case.forward_context():
        y = torch.func.functional_call(stack, other, (x,))
    case.loss(y).backward()
    return [y, x.grad, *[p.grad for p in other.values()], *case.gradients(stack)]
