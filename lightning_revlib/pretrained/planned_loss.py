"""The loss by chunks in memory plans: what it takes at once, it takes while the stacks hold all they hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revlib.nn.convert.swap import stacks
from lightning_revlib.nn.plan.budget import LOSS, Budget, Signature
from lightning_revlib.nn.plan.cost import StackCosts, StepCosts
from lightning_revlib.nn.plan.fingerprint import fingerprint_of
from lightning_revlib.nn.plan.profile import measure_loss
from lightning_revlib.nn.state.context import autocast_kind


def expecting_budgets(model: nn.Module) -> list[Budget]:
    """Have the budgets of a model's stacks expect the costs of the loss, and return them."""
    found = {id(stack.budget): stack.budget for stack in stacks(model).values() if stack.budget is not None}
    for budget in found.values():
        budget.expect_loss()
    return [*found.values()]


def count_loss(
    budget: Budget, loss: Callable[[Tensor], Tensor], hidden: Tensor, head: nn.Module, *settings: Any
) -> None:
    """Tell a budget that the loss of these hidden states runs now; measure it if the budget does not know its costs.

    Args:
        budget: of the model's stacks.
        loss: of hidden states, a number.
        hidden: of shape (rows, width).
        head: the module whose weights the loss reads.
        *settings: what the costs depend on besides.

    Raises:
        ValueError: if the budget is too small.
    """
    kind = autocast_kind(hidden.device)
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    needed = [p.requires_grad for p in head.parameters()]
    signature = Signature(tuple(hidden.shape), (hidden.dtype, hidden.requires_grad, kind, autocast, *needed))
    if budget.treatments(LOSS, signature, partial(fingerprint_of, [head], *settings)) is None:
        cost = measure_loss(loss, hidden, head)
        budget.add(LOSS, signature, StackCosts([StepCosts(0, 0, {"store": cost})], 0))
