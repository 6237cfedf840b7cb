"""An optimizer's step that leaves weights and state as they were."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
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

    Optimizers that it wraps are put back, too. Weights and state are copied meanwhile, to the host's memory.
    """
    with ExitStack() as stack:
        for each in [] if optimizer is None else wrapped(optimizer):
            stack.enter_context(_preserve(each))
        yield


def wrapped(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer, and those among its attributes, as wrappers have one, or a list or dict of some."""
    found = [optimizer]
    for each in found:
        for value in pytree.tree_leaves(list(vars(each).values())):
            if isinstance(value, Optimizer) and all(value is not other for other in found):
                found.append(value)
    return found


def needs_closure(optimizer: Optimizer) -> bool:
    """Return whether its step needs a function that runs forward and backward, as that of LBFGS does."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


@contextmanager
def _preserve(optimizer: Optimizer) -> Iterator[None]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    weights = [_copy(p) for p in parameters]
    state = {p: dict(x) if isinstance(x, dict) else x for p, x in optimizer.state.items()}
    groups = [dict(group) for group in optimizer.param_groups]
    own = [x for name, x in vars(optimizer).items() if isinstance(x, (dict, list)) and name not in OURS]
    containers = [(value, copy.copy(value)) for value in own]
    tensors = [t for t in pytree.tree_leaves([*state.values(), *own, *groups]) if isinstance(t, Tensor)]
    values = [_copy(t) for t in tensors]
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


def drop_state(optimizer: Optimizer, unused: Iterable[Tensor]) -> bool:
    """Drop the state of some parameters, which `make_state` has made; return whether there was any."""
    states = [each.state for each in wrapped(optimizer)]
    dropped = [state.pop(p) for p in unused for state in states if p in state]
    return bool(dropped)


def _copy(tensor: Any) -> Tensor:
    return tensor.detach().to("cpu", copy=True) if tensor.device.type != "meta" else tensor
