"""Treatment "selective": what is dear to compute is kept, too, and the rest of the block runs again.

`torch.utils.checkpoint.create_selective_checkpoint_contexts` raises an error if a block changes in place what was kept.
Here it is right: what is kept is copied before such a change.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from lightning_revlib.nn.internals import TorchDispatchMode, pytree
from lightning_revlib.nn.state.tensors import places_written, version, written
from lightning_revlib.nn.treatments.checkpoint import Checkpoint, CheckpointFrame, Contexts


class Selective(Checkpoint):
    """Keep the block's input, its matrix products and convolutions, and run the rest of the block again."""

    dispatches_in_python = True

    @classmethod
    def is_offered(cls, options: Any) -> bool:
        return options.context_fn is None  # it has contexts of its own

    def contexts(self) -> Contexts | None:
        return keep_heavy


def keep_heavy(frame: CheckpointFrame) -> tuple[Any, Any]:
    """Return contexts for a first and a second run: the first keeps heavy outputs for the second.

    Nothing is kept that the block has put out after the last tensor that it saves, as the second run ends there. A
    second run for a second backward finds nothing, and computes all.
    """
    kept: dict[int, Any] = {}
    return _Keep(kept, frame), _Reuse(kept)


class _Counting(TorchDispatchMode):
    """Counts the heavy operations of a run."""

    def __init__(self, kept: dict[int, Any]) -> None:
        super().__init__()
        self.kept, self.count = kept, 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Tell torch that compiled blocks run as they are compiled: what is inside of them is not kept."""
        return True

    def __enter__(self) -> Any:
        self.count = 0
        return super().__enter__()


class _Keep(_Counting):
    def __init__(self, kept: dict[int, Any], frame: CheckpointFrame) -> None:
        super().__init__(kept)
        self.frame = frame
        self.before: dict[int, int] = {}  # how much was saved before an output, its operation's inputs included
        self.storages: dict[int, list[int]] = {}  # of what is kept
        self.owners: dict[int, int] = {}  # by storage, the output in it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        heavy = is_heavy(func)
        if self.owners:
            for t in written(func, args, kwargs):
                number = self.owners.pop(t.untyped_storage()._cdata, None)
                if number is not None:
                    self._keep(number, pytree.tree_map_only(Tensor, torch.clone, self.kept[number]))
        out = func(*args, **kwargs)
        if heavy:
            number, self.count = self.count, self.count + 1
            self.before[number] = len(self.frame.saved or ())
            self._keep(number, out)
            self.owners.update(dict.fromkeys(self.storages[number], number))
        return out

    def _keep(self, number: int, out: Any) -> None:
        self.kept[number], self.storages[number] = out, _storages(out)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for number, count in self.before.items():
            if count == len(self.frame.saved or ()) or _storages(self.kept[number]) != self.storages[number]:
                del self.kept[number]  # or it was given other data, of which no operation tells
            else:  # without its graph; detached outside of the mode, it shares the version that in-place changes raise
                out = pytree.tree_map_only(Tensor, Tensor.detach, self.kept[number])
                self.kept[number] = out, versions(out)


class _Reuse(_Counting):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_heavy(func):
            out, kept = self.kept.pop(self.count, (None, None))
            self.count += 1
            if kept is not None and versions(out) == kept:  # else it has been changed since
                return out
        return func(*args, **(kwargs or {}))


def versions(out: Any) -> list[int]:
    return [version(t) for t in _tensors(out)]


@lru_cache(maxsize=4096)
def is_heavy(func: Any) -> bool:
    """Return whether the output of an operation is kept.

    Heavy is what PyTorch counts FLOPs for, and attention's kernel on the CPU, which is not in PyTorch's list. What
    changes an argument has to be done again, and does not count as heavy.
    """
    heavy = func._overloadpacket in flop_registry or "scaled_dot_product" in func._schema.name
    return heavy and not places_written(func)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def _storages(out: Any) -> list[int]:
    return [t.untyped_storage()._cdata for t in _tensors(out)]
