"""Selective checkpointing that keeps what is dear to compute, and is right where blocks change it in place.

`torch.utils.checkpoint.create_selective_checkpoint_contexts` hands out what it has kept as it is by then: gradients are
silently wrong if the block has changed it. Here what is kept parts from what is about to be changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry


def keep_heavy() -> tuple[Any, Any]:
    """Contexts for a first and a second run: the first keeps matrix products, convolutions, attention, for the second.

    A second run of a second backward finds nothing kept, and computes all.
    """
    kept: dict[int, Any] = {}
    return _Keep(kept), _Reuse(kept)


class _Keep(TorchDispatchMode):
    def __init__(self, kept: dict[int, Any]) -> None:
        super().__init__()
        self.kept, self.count = kept, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            changed = {t.untyped_storage()._cdata for t in written(func, args, kwargs)}
            for number, out in self.kept.items():
                if any(t.untyped_storage()._cdata in changed for t in tree_leaves(out) if isinstance(t, Tensor)):
                    self.kept[number] = tree_map_only(Tensor, torch.clone, out)
        out = func(*args, **kwargs)
        if is_heavy(func):
            self.kept[self.count] = tree_map_only(Tensor, torch.detach, out)
            self.count += 1
        return out


class _Reuse(TorchDispatchMode):
    def __init__(self, kept: dict[int, Any]) -> None:
        super().__init__()
        self.kept, self.count = kept, 0

    def __enter__(self) -> Any:
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = None
        if is_heavy(func):
            out = self.kept.pop(self.count, None)
            self.count += 1
        return func(*args, **(kwargs or {})) if out is None else out


def is_heavy(func: Any) -> bool:
    """Whether PyTorch counts FLOPs for it, or should: attention's kernel on the CPU is not in its list."""
    return func._overloadpacket in flop_registry or "scaled_dot_product" in func._schema.name


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments that an operation changes."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (t for t in tree_leaves(value) if isinstance(t, Tensor))
