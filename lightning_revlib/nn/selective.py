"""Selective checkpointing that keeps what is dear to compute, and is right where blocks change it in place.

`torch.utils.checkpoint.create_selective_checkpoint_contexts` hands out what it has kept as it is by then: gradients are
silently wrong if the block has changed it. Here what is kept parts from what is about to be changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry


def keep_heavy(saved: Sequence[int]) -> tuple[Any, Any]:
    """Contexts for a first and a second run: the first keeps matrix products, convolutions, attention, for the second.

    `saved` grows with what autograd saves in the first run. The second ends with the last of it, and what has been put
    out later is not kept. A second run of a second backward finds nothing kept, and computes all.
    """
    kept: dict[int, Any] = {}
    return _Keep(kept, saved), _Reuse(kept)


class _Keep(TorchDispatchMode):
    def __init__(self, kept: dict[int, Any], saved: Sequence[int]) -> None:
        super().__init__()
        self.kept, self.saved, self.count = kept, saved, 0
        self.before: dict[int, int] = {}  # how much was saved before an output, its operation's inputs included
        self.owners: dict[int, int] = {}  # by storage, the output in it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        heavy, writes = traits(func)
        if writes and self.owners:
            for t in written(func, args, kwargs):
                number = self.owners.pop(t.untyped_storage()._cdata, None)
                if number is not None:
                    self.kept[number] = tree_map_only(Tensor, torch.clone, self.kept[number])
        out = func(*args, **kwargs)
        if heavy:
            number, self.count = self.count, self.count + 1
            self.kept[number] = out.detach() if type(out) is Tensor else tree_map_only(Tensor, torch.detach, out)
            self.before[number] = len(self.saved)
            self.owners.update((t.untyped_storage()._cdata, number) for t in tree_leaves(out) if isinstance(t, Tensor))
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for number, count in self.before.items():
            if count == len(self.saved):
                del self.kept[number]


class _Reuse(TorchDispatchMode):
    def __init__(self, kept: dict[int, Any]) -> None:
        super().__init__()
        self.kept, self.count = kept, 0

    def __enter__(self) -> Any:
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = None
        if traits(func)[0]:
            out = self.kept.pop(self.count, None)
            self.count += 1
        return func(*args, **(kwargs or {})) if out is None else out


@lru_cache(maxsize=4096)
def traits(func: Any) -> tuple[bool, Sequence[tuple[int, str]]]:
    """Whether PyTorch counts FLOPs for it, or should, and which arguments it changes, by place and name.

    Attention's kernel on the CPU is not in PyTorch's list.
    """
    schema = func._schema
    heavy = func._overloadpacket in flop_registry or "scaled_dot_product" in schema.name
    places = enumerate(schema.arguments)
    return heavy, [(i, a.name) for i, a in places if a.alias_info is not None and a.alias_info.is_write]


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments that an operation changes."""
    for index, name in traits(func)[1]:
        value = args[index] if index < len(args) else kwargs.get(name)
        yield from (t for t in tree_leaves(value) if isinstance(t, Tensor))
