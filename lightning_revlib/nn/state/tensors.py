"""What can be asked of tensors and operations, and values with tensors in them as a frame may hold them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from operator import is_
from typing import Any

import torch
from torch import Tensor

from lightning_revlib.nn.internals import pytree


def version(tensor: Tensor) -> int:
    """Return how often the tensor was changed in place; 0 for inference tensors, which do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """Return how often each tensor was changed in place."""
    tensors = [*tensors]
    try:
        return [t._version for t in tensors]
    except RuntimeError:
        return [version(t) for t in tensors]


def is_fake(tensor: Tensor) -> bool:
    """Return whether the tensor is of a FakeTensorMode: it has a device, and no memory there."""
    if type(tensor) is Tensor or tensor.is_meta:
        return False
    return values_of(tensor).untyped_storage().device.type == "meta"


def values_of(tensor: Tensor) -> Tensor:
    """Return the tensor; of a nested one of the jagged layout, the tensor of all its values."""
    return tensor.values() if tensor.layout is torch.jagged else tensor


@lru_cache(maxsize=4096)
def places_written(func: Any) -> Sequence[tuple[int, str]]:
    """Return which arguments an operation changes in place, by place and name."""
    if not hasattr(func, "_schema"):  # an operator of higher order
        return ()
    places = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in places if a.alias_info is not None and a.alias_info.is_write]


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Yield the tensors that an operation changes in place."""
    for index, name in places_written(func):
        given = args[index] if index < len(args) else kwargs.get(name)
        yield from [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)]


def without_graph(tensor: Tensor) -> Tensor:
    """Return the tensor, to be held by a frame; one with a graph as a leaf, as its graph may refer to the frame."""
    return tensor if tensor.grad_fn is None else tensor.detach().requires_grad_()


def is_data(value: Any) -> bool:
    """Return whether a value consists of plain values and tensors, of which `without_graphs` holds no graph."""
    if isinstance(value, dict):
        return type(value) is dict and all(map(is_data, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_data, value))
    return isinstance(value, (Tensor, bool, int, float, str, type(None)))


def without_graphs(value: Any, copies: dict[int, Any] | None = None) -> Any:
    """Return a value to be held by a frame: `without_graph` what tensors are in it, and dicts and lists as copies.

    What is in it twice, as `copies` tell, is the same in the copy. A dict or list whose class refuses it is not copied.
    """
    copies = {} if copies is None else copies
    if isinstance(value, Tensor):
        return value if value.grad_fn is None else copies.setdefault(id(value), without_graph(value))
    if isinstance(value, tuple):
        inner = [without_graphs(each, copies) for each in value]
        if all(map(is_, inner, value)):
            return value
        return value._make(inner) if hasattr(value, "_make") else type(value)(inner)
    if not isinstance(value, (dict, list)):
        return value
    if id(value) not in copies:
        try:
            copies[id(value)] = copied = copy.copy(value)
            for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                if (held := without_graphs(each, copies)) is not each:
                    copied[key] = held
        except Exception:
            copies[id(value)] = value
    return copies[id(value)]
