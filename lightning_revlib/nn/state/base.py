"""What a block's call depends on besides its input, noted in forward and restored for the block's second run.

A kind of state is one class in a file of its own and one entry of `KINDS`. A kind that is `shared` is captured once a
forward, in a `Scope`; the others are captured for each call, in a `CallState`. Neither knows what its parts are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_revlib.nn.internals import graph_task
from lightning_revlib.nn.state.torch_layers import is_inert

NOTHING: AbstractContextManager[Any] = nullcontext()
Former: TypeAlias = dict[tuple[int, int], tuple[Tensor, Tensor]]  # by id and version: a tensor, and its value then


class StateError(RuntimeError):
    """A call's state cannot be captured or put in place. Whoever runs the block adds its path."""


class Call(NamedTuple):
    """A block's call, or all calls of a forward: the blocks' modules, a stream, and the arguments besides.

    `authored` are the modules of the forward that are more than a torch layer: see `is_inert`. `arguments` are the
    tensors among the arguments of one call. `former` has what calls of the forward have changed in place, for the calls
    before them. `part` tells calls of a block's branches apart.
    """

    modules: Sequence[nn.Module]
    stream: Tensor
    arguments: Sequence[Tensor]
    authored: Set[nn.Module]
    former: Former
    part: str = ""


class State(ABC):
    """One thing that a block's call depends on besides its input.

    >>> class Seed(State):  # of a library with a random state of its own
    ...     def __init__(self, call):
    ...         self.before = library.seed
    ...     def close(self):
    ...         return library.seed != self.before
    ...     @contextmanager
    ...     def restore(self, modules):
    ...         now, library.seed = library.seed, self.before
    ...         try:
    ...             yield
    ...         finally:
    ...             library.seed = now
    >>> KINDS.append(Seed)
    """

    __slots__ = ()
    shared: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, call: Call) -> None:
        """Capture the state before the call; of a shared kind, before the first call of a forward."""

    def close(self) -> bool:
        """Note what the call has changed; return whether a second run needs this state at all."""
        return True

    def is_current(self) -> bool:
        """Return whether there is nothing to restore. Shared kinds only are asked, once in each backward."""
        return False

    @classmethod
    def concerns(cls, call: Call) -> bool:
        """Return whether any of the calls of a forward can depend on such a state at all."""
        return True

    @abstractmethod
    def restore(self, modules: Sequence[nn.Module]) -> AbstractContextManager[Any]:
        """Put the state in place for a block of these modules, and at the end what was there before.

        Raises StateError if the state cannot be put in place, since it was overwritten.
        """


KINDS: list[type[State]] = []  # in the order of restoring; those of torch are listed in `state/__init__.py`


class Scope:
    """State that the calls of one forward have in common: the forward of a stack, or of one layer of a list.

    `blocks` are those that are called, `stream` is a tensor on their device. `close` it after the last call.
    """

    def __init__(self, blocks: Iterable[nn.Module], stream: Tensor, former: Former) -> None:
        self.grad_enabled = torch.is_grad_enabled()
        self._modules = {block: modules_of(block) for block in blocks}
        self._former = former
        self._task: int | None = None  # the backward for which it is known what is outdated
        self._outdated: set[State] = set()
        modules = [m for inside in self._modules.values() for m in inside]
        self._authored = frozenset([m for m in modules if not is_inert(m)])
        call = Call(modules, stream, (), self._authored, former)
        self._kinds = [kind for kind in KINDS if kind.concerns(call)]
        self._shared = {kind: kind(call) for kind in self._kinds if kind.shared}

    def capture(self, block: nn.Module, stream: Tensor, arguments: Sequence[Tensor], part: str) -> CallState:
        """Return the state before a call of `block`."""
        call = Call(self._modules[block], stream, arguments, self._authored, self._former, part)
        return CallState(self, call, [self._shared[kind] if kind.shared else kind(call) for kind in self._kinds])

    def close(self) -> None:
        self._shared = {kind: state for kind, state in self._shared.items() if state.close()}

    def needed(self, parts: Sequence[State]) -> list[State]:
        """Return those of a call's states that have to be restored in the backward that runs."""
        if self._task != graph_task():
            self._task = graph_task()
            self._outdated = {state for state in self._shared.values() if not state.is_current()}
        return [state for state in parts if not state.shared or state in self._outdated]


class CallState:
    """State of one call of a block. `close` it after the call; `restore` it around the second run."""

    __slots__ = ("modules", "parts", "scope")

    def __init__(self, scope: Scope, call: Call, parts: list[State]) -> None:
        self.scope, self.modules, self.parts = scope, call.modules, parts

    def close(self) -> None:
        self.parts = [part for part in self.parts if part.shared or part.close()]

    def restore_shared(self) -> AbstractContextManager[None]:
        """Put in place what all calls of the forward have met alike."""
        return self._restore(self.scope.needed([part for part in self.parts if part.shared]))

    def restore(self) -> AbstractContextManager[None]:
        """Put in place what the call has met, and at the end what was there before."""
        parts = self.scope.needed(self.parts)
        if len(parts) < 2:
            return parts[0].restore(self.modules) if parts else NOTHING
        return self._restore(parts)

    @contextmanager
    def _restore(self, parts: Sequence[State]) -> Iterator[None]:
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.restore(self.modules))
            yield


def modules_of(block: nn.Module) -> list[nn.Module]:
    """Return a block and all modules in it. It takes a quarter of the time of `block.modules()`."""
    found, seen = [block], {block}
    for m in found:
        for child in m._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def brief(m: nn.Module) -> str:
    """Return a module's type and options in one line, without the modules in it."""
    return f"{type(m).__name__}({m.extra_repr()})"
