"""Conditions on the treatments of blocks: reversible, checkpoint, selective, store, a memory budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from tests.nn.conditions.base import Case, condition
from tests.nn.conditions.requires_grad import Settles


def _parts(case: Case) -> list[nn.Module]:
    return [case.block(nn.BatchNorm1d(case.width), nn.Dropout(0.3), nn.Tanh()) for _ in range(6)]


@condition
def last_blocks_stored(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*_parts(case), store_last=2))


@condition
def all_blocks_stored(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*_parts(case), store_last=6))


@condition
def all_blocks_checkpointed(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*_parts(case), treatments=["checkpoint"] * 6))


@condition
def flags_that_checkpointed_blocks_change_for_good(case: Case) -> list[Tensor | None]:
    stack = case.stack(*[Settles(case) for _ in range(3)], treatments=["checkpoint", "selective", "reversible"])
    return [*case.train(stack), *case.train(stack)]


@condition
def treatments_mixed(case: Case) -> list[Tensor | None]:
    mixed = ["reversible", "checkpoint", "reversible", "reversible", "store", "reversible"]
    return case.train(case.stack(*_parts(case), treatments=mixed))


@condition
def treatments_mixed_on_duplicated_input(case: Case) -> list[Tensor | None]:
    mixed = ["store", "reversible", "reversible", "checkpoint", "reversible", "checkpoint"]
    return case.train(case.stack(*_parts(case), treatments=mixed, split_dim=None), case.input(width=case.width))


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts([torch.ops.aten.addmm.default, torch.ops.aten.mm.default])


@condition
def selective_policy(case: Case) -> list[Tensor | None]:
    mixed = ["reversible"] * 3 + ["checkpoint"] + ["reversible"] * 2
    return case.train(case.stack(*_parts(case), treatments=mixed, context_fn=_keep_products))


@condition
def all_blocks_selective(case: Case) -> list[Tensor | None]:
    return case.train(case.stack(*_parts(case), treatments=["selective"] * 6))


class ChangesProducts(nn.Module):
    """Changes the outputs of what selective checkpointing keeps, in place, and views of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).view(-1, self.inner.out_features)
        a, b = h.sub_(1).sigmoid_().view(*x.shape[:-1], -1).chunk(2, -1)
        return self.outer(a * b).mul_(0.5).tanh_()


@condition
def selective_where_products_change_in_place(case: Case) -> list[Tensor | None]:
    return case.train(
        case.stack(*[case.block(ChangesProducts(case.width)) for _ in range(3)], treatments=["selective"] * 3)
    )


@condition
def selective_twice(case: Case) -> list[Tensor | None]:
    stack, x = case.stack(*_parts(case), treatments=["selective"] * 6), case.input()
    loss = case.loss(case.call(stack, x))
    loss.backward(retain_graph=True)
    loss.backward()
    return [x.grad, *case.gradients(stack)]


@condition
def memory_budget(case: Case) -> list[Tensor | None]:
    stack = case.stack(*_parts(case), memory_budget=0.9)
    return [*case.train(stack), *case.train(stack)]  # the first measures, the second follows the plan
