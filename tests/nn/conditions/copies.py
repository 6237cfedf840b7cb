"""Conditions on copies of a stack, and on forwards without gradients."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor

from tests.nn.conditions.base import Case, condition


@condition
def deep_copy(case: Case) -> list[Tensor | None]:
    stack = case.mlp(3)
    case.train(stack)
    stack.zero_grad()
    return case.train(copy.deepcopy(stack))


@condition
def pickled(case: Case) -> list[Tensor | None]:
    stack, file = case.mlp(3), io.BytesIO()
    case.train(stack)
    torch.save(stack, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    again.zero_grad()
    return case.train(again)


@condition
def no_grad_between(case: Case) -> list[Tensor | None]:
    stack = case.mlp(3)
    with torch.no_grad():
        plain = case.call(stack, case.input())
    with torch.inference_mode():
        case.call(stack, case.input())
    return [plain, *case.train(stack)]
