"""What autograd saves in one call of a block: it gets numbers, and a second run of the block finds the tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, clear_autocast_cache
from torch.autograd.graph import saved_tensors_hooks

from lightning_revlib.nn.compilation import compiled_by
from lightning_revlib.nn.engine.errors import (
    computes_otherwise,
    draws_in_batched_gradients,
    graph_freed,
    kept_modified,
    saved_modified,
)
from lightning_revlib.nn.internals import never_compile, outside_transforms
from lightning_revlib.nn.state.base import NOTHING, CallState
from lightning_revlib.nn.state.tensors import versions
from lightning_revlib.nn.steps.step import Step

ContextFunction: TypeAlias = Callable[[], tuple[Any, Any]]  # contexts of a first and a second run


def make_contexts(context_fn: ContextFunction) -> tuple[Any, Any]:
    """Return the contexts of a first and a second run."""
    first, second = context_fn()
    # torch 2.14 asks a selective context whether saved-tensor hooks round it are a user's: here they are the engine's.
    if getattr(first, "respect_saved_tensors_hooks", True) is None:
        first.respect_saved_tensors_hooks = False
    return first, second


class Enough(BaseException):
    """Raised when a second run has saved the last tensor that backward needs. A block must not catch it."""


class SavedTensors(ABC):
    """The tensors that autograd saves while a step runs, by number; `tape` explains the whole.

    While the step runs, they are at hand: its block may call autograd itself. After `end`, only their sizes are left.
    """

    __slots__ = ("__weakref__", "changed", "recomputed", "rerun", "saved", "sizes", "state", "step", "versions")

    is_rebuilt = False  # whether the second run's input was computed by the coupling's inverse

    def __init__(self, step: Step, state: CallState) -> None:
        self.step, self.state = step, state
        self.saved: list[tuple[Tensor, int]] | None = []  # while the step runs: tensors and their versions
        self.sizes: list[int] = []  # in bytes, after it
        self.changed: dict[int, torch.Size] = {}  # shapes of those that were modified in place after they were saved
        self.recomputed: list[Tensor | None] | None = None  # each until autograd has asked for it
        self.versions: list[int] | None = None  # of recomputed tensors that stay: the gradient is itself differentiated
        self.rerun: AbstractContextManager[Any] = NOTHING  # around the second run, made by `context_fn`

    @abstractmethod
    def recompute(self) -> None:
        """Run the block a second time, and `keep` what it saves."""

    def hooks(self) -> saved_tensors_hooks:
        """Return the context in which the step runs first."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def end(self) -> None:
        """Release the tensors when the step has run, or failed: they refer to the graph, which refers to this."""
        saved, self.saved = self.saved or [], None
        self.sizes = sizes_of([t for t, _ in saved])
        self.changed = {n: t.shape for n, (t, count) in enumerate(saved) if t._version != count}

    def run_again(self, x: Tensor, saved: list[Tensor], compiler: Any, enough: int = -1) -> Any:
        """Run the block on x again, adding to `saved` what autograd saves, and return its branch.

        Raises Enough when so many tensors are saved.
        """
        try:
            with torch.set_grad_enabled(self.state.scope.grad_enabled), catch(saved, enough), self.rerun:
                return self.step.again().branch(x, compiler)[0]
        finally:
            clear_autocast_cache()  # backward may run within autocast, which would keep the weights as it casts them

    def keep(self, saved: list[Tensor], retain: bool) -> None:
        """Have at hand what the second run has saved. Raises RuntimeError if the first has saved something else."""
        if (sizes := sizes_of(saved)) != self.sizes:
            raise computes_otherwise(self.step, self.sizes, saved, sizes, self.is_rebuilt)
        self.recomputed = [None if n in self.changed else t for n, t in enumerate(saved)] if self.changed else [*saved]
        self.versions = versions(saved) if retain else None

    def take_recomputed(self) -> list[Tensor | None] | None:
        """Return what the second run has saved, and have it no more."""
        recomputed, self.recomputed = self.recomputed, None
        return recomputed

    def put_recomputed(self, recomputed: list[Tensor | None]) -> None:
        """Have at hand again what `take_recomputed` has returned."""
        self.recomputed = recomputed

    def _pack(self, tensor: Tensor) -> int:
        assert self.saved is not None
        self.saved.append((tensor, tensor._version))
        return len(self.saved) - 1

    def _unpack(self, number: int) -> Tensor:
        tensor = None if self.recomputed is None else self.recomputed[number]
        if tensor is None:
            return self._find(number)
        if self.versions is None:
            self.recomputed[number] = None  # type: ignore[index]  # memory falls as the block's backward proceeds
        elif tensor._version != self.versions[number]:
            raise kept_modified(self.step, tensor.shape)
        return tensor

    def _find(self, number: int) -> Tensor:
        """Return a tensor that is not at hand. Raises RuntimeError if it cannot be recomputed."""
        if self.saved is not None:  # the block calls autograd itself
            return self.saved[number][0]
        if number in self.changed:
            raise saved_modified(self.step.name, self.changed[number])
        try:
            with outside_transforms(), compiled_by(None):  # vmap may be round backward
                self.recompute()
        except RuntimeError as error:
            if "random operations inside of vmap" in str(error):
                raise draws_in_batched_gradients(self.step) from error
            raise
        return self._unpack(number)


def sizes_of(tensors: list[Tensor]) -> list[int]:
    """Return the bytes of tensors; of a sparse one, those of its values."""
    try:
        return [t.nbytes for t in tensors]
    except RuntimeError:
        return [t.nbytes if t.layout is torch.strided else t._nnz() * t.element_size() for t in tensors]


def catch(tensors: list[Tensor], enough: int = -1) -> saved_tensors_hooks:
    """Return a context that adds what autograd saves to a list. Inside, Enough is raised when so many are complete."""
    return saved_tensors_hooks(partial(collect, tensors, enough), partial(_find_in, tensors))


def _find_in(tensors: list[Tensor], number: int) -> Tensor:
    if number >= len(tensors):
        raise graph_freed()
    return tensors[number]


def collect(tensors: list[Tensor], enough: int, tensor: Tensor) -> int:
    """Add a tensor to the others and return its number. Raises Enough when so many are complete."""
    if len(tensors) == enough:
        raise Enough
    tensors.append(tensor)
    if len(tensors) == enough and not any(map(_may_be_empty, tensors[-2:])):
        raise Enough
    return len(tensors) - 1


def _may_be_empty(tensor: Tensor) -> bool:
    """Return whether the operation that saves the tensor may fill it afterwards.

    Of torch's, `rrelu_with_noise` does: it saves its noise and its input, and then draws.
    """
    is_made_here = tensor.is_leaf and tensor._base is None and not isinstance(tensor, torch.nn.Parameter)
    return is_made_here and tensor.is_floating_point() and not tensor.requires_grad and not tensor._version


never_compile(SavedTensors._pack, SavedTensors._unpack, collect, _find_in, _may_be_empty)
