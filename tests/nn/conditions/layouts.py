"""Conditions on the layout of streams in memory, which decides on what kernels save."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.nn.conditions.base import Case, condition, drawn


def _layout(case: Case, x: Tensor, **options: Any) -> list[Tensor | None]:
    """Lay out memory in several ways, on which it depends what kernels save; bare blocks see their input's layout."""
    stack = case.stack(*[nn.Linear(case.width, case.out_width) for _ in range(3)], **options)
    leaf = x.detach().requires_grad_()
    y = case.call(stack, leaf)
    case.loss(y).backward()
    return [y, leaf.grad, *case.gradients(stack)]


def _last(case: Case) -> dict[str, Any]:
    """Options for streams along the last dimension."""
    coupling = case.options.get("coupling")
    return {"split_dim": -1, **({"coupling": {"name": "affine", "dim": -1}} if coupling == "affine" else {})}


def _tokens(case: Case, *shape: int) -> Tensor:
    return drawn(9, *shape, dtype=case.dtype)


@condition
def as_many_tokens_as_channels(case: Case) -> list[Tensor | None]:
    return _layout(case, _tokens(case, 2, case.width // 2, 2 * case.width), **_last(case))


@condition
def three_dimensions(case: Case) -> list[Tensor | None]:
    return _layout(case, _tokens(case, case.batch, 5, 2 * case.width), **_last(case))


@condition
def one_sample(case: Case) -> list[Tensor | None]:
    return _layout(case, _tokens(case, 1, case.width, 2 * case.width), **_last(case))


@condition
def transposed_input(case: Case) -> list[Tensor | None]:
    return _layout(case, _tokens(case, case.width, 2, 2 * case.width).transpose(0, 1), **_last(case))


@condition
def expanded_input(case: Case) -> list[Tensor | None]:
    x = _tokens(case, 1, 1, 2 * case.width).requires_grad_()
    stack = case.stack(*[nn.Linear(case.width, case.out_width) for _ in range(3)], **_last(case))
    y = case.call(stack, x.expand(2, case.width // 2, -1))
    case.loss(y).backward()
    return [y, x.grad, *case.gradients(stack)]


@condition
def transposed_and_duplicated_input(case: Case) -> list[Tensor | None]:
    return _layout(case, _tokens(case, case.width, 2, case.width).transpose(0, 1), **{**_last(case), "split_dim": None})


class Turned(nn.Module):
    """Gives its branch in another layout than its input's."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.layer = nn.Linear(case.width, case.out_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).transpose(0, 1).contiguous().transpose(0, 1)


@condition
def branches_in_another_layout(case: Case) -> list[Tensor | None]:
    stack, x = (
        case.stack(*[Turned(case) for _ in range(4)], **_last(case)),
        _tokens(case, case.batch - 1, 2, 2 * case.width),
    )
    return case.train(stack, x.requires_grad_())


@condition
def channels_last(case: Case) -> list[Tensor | None]:
    blocks = [nn.Conv2d(case.width, case.out_width, 3, padding=1) for _ in range(3)]
    x = _tokens(case, case.batch // 2, 2 * case.width, 4, 4).to(memory_format=torch.channels_last)
    return case.train(case.stack(*blocks, split_dim=1), x.requires_grad_())
