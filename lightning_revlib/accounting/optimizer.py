"""An optimizer's step that leaves weights and state as they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_revlib.nn.internals import pytree

PLAIN = (int, float, bool, str, type(None))
OURS = ("state", "param_groups")  # the attributes that all optimizers have


@contextmanager
def preserve_optimizer(optimizer: Optimizer | None) -> Iterator[None]:
    """Put back at the end the optimizer's weights, state, options, and own dicts and lists, which its steps may change.

    Weights and state are copied meanwhile, to the host's memory.
    """
    if optimizer is None:
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    weights = [_copy(p) for p in parameters]
    state = {p: dict(values) for p, values in optimizer.state.items()}
    own = [x for name, x in vars(optimizer).items() if isinstance(x, (dict, list)) and name not in OURS]
    containers = [(value, copy.copy(value)) for value in own]
    tensors = [t for t in pytree.tree_leaves([*state.values(), *own]) if isinstance(t, Tensor)]
    values = [_copy(t) for t in tensors]
    groups = [dict(group) for group in optimizer.param_groups]
    attributes = {name: value for name, value in vars(optimizer).items() if isinstance(value, PLAIN)}
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip([*parameters, *tensors], [*weights, *values], strict=True):
                tensor.copy_(value)
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, before in [*zip(optimizer.param_groups, groups, strict=True), *containers]:
            group.clear()
            group.extend(before) if isinstance(group, list) else group.update(before)
        vars(optimizer).update(attributes)


def make_state(optimizer: Optimizer) -> None:
    """Have the optimizer make its state, as its first step does, from gradients of zeros."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()


def _copy(tensor: Any) -> Tensor:
    return tensor.detach().to("cpu", copy=True) if tensor.device.type != "meta" else tensor
