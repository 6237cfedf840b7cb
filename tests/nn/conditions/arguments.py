"""Conditions on what a stack is called with and what its blocks return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.nn.conditions.base import Case, condition


class Conditioned(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.body = case.block(nn.Tanh())

    def forward(self, x: Tensor, *args: Any, scale: Any = None, memory: Any = None) -> Tensor:
        for arg in args:
            x = x + arg if arg is not None else x
        out = self.body(x if memory is None else x * memory["key"].sigmoid())
        return out if scale is None else out * scale


@condition
def arguments_of_all_kinds(case: Case) -> list[Tensor | None]:
    stack, x, leaf = case.stack(*[Conditioned(case) for _ in range(3)]), case.input(), case.input(width=case.width)
    shift = torch.ones(case.width, dtype=case.dtype)
    result = case.train(stack, x, shift, None, scale=0.5, memory={"key": leaf * 2, "name": "memory"})
    return [*result, leaf.grad]


@condition
def layerwise_arguments(case: Case) -> list[Tensor | None]:
    stack, x, leaf = case.stack(*[Conditioned(case) for _ in range(3)]), case.input(), case.input(width=case.width)
    calls = [((leaf * k,), {"scale": k + 1.0}) for k in range(3)]
    return [*case.train(stack, x, 0.1, layerwise=calls), leaf.grad]


class Attends(nn.Module):
    """Returns its branch, a loss, and weights that no gradient flows through, in one of three ways."""

    def __init__(self, case: Case, how: str) -> None:
        super().__init__()
        self.body, self.how = case.block(nn.Tanh()), how

    def forward(self, x: Tensor) -> Any:
        out = self.body(x)
        aux, weights = out.to(x.dtype).square().mean(), x.detach().softmax(-1)
        return {
            "tuple": (out, aux, None, weights),
            "dict": {"out": out, "aux": aux, "weights": weights},
            "dataclass": Output(out, aux, weights),
        }[self.how]


@dataclass
class Output:
    out: Tensor
    aux: Tensor
    weights: Tensor


def _with_extras(case: Case, order: str) -> list[Tensor | None]:
    kinds = ("tuple", "dict", "dataclass")
    stack, x = case.stack(*[Attends(case, how) for how in kinds], case.block()), case.input()
    y, extras = case.call(stack, x)
    assert extras[3] is None and [type(extra) for extra in extras[:3]] == [tuple, dict, dict]
    main, aux = case.loss(y), extras[0][0] + 2 * extras[1]["aux"] + 3 * extras[2]["aux"]
    losses = {"m": main, "a": aux, "s": main + aux}
    if order == "a":
        del y, main, losses["m"], losses["s"]  # the output is gone before the backward
    for k, which in enumerate(order):
        losses[which].backward(retain_graph=k + 1 < len(order))
    return [aux, extras[0][2], extras[2]["weights"], x.grad, *case.gradients(stack)]


@condition
def extra_outputs(case: Case) -> list[Tensor | None]:
    return _with_extras(case, "s")


@condition
def extra_outputs_first(case: Case) -> list[Tensor | None]:
    return _with_extras(case, "am")


@condition
def extra_outputs_last(case: Case) -> list[Tensor | None]:
    return _with_extras(case, "ma")


@condition
def extra_outputs_alone(case: Case) -> list[Tensor | None]:
    return _with_extras(case, "a")


@condition
def duplicated_input(case: Case) -> list[Tensor | None]:
    blocks = [case.block(nn.Linear(case.width, case.width), nn.Tanh()) for _ in range(4)]
    return case.train(case.stack(*blocks, split_dim=None), case.input(width=case.width))


@condition
def negative_split_dim(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*[case.block(nn.Tanh()) for _ in range(3)], split_dim=-1))
