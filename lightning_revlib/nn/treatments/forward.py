"""What the treatments of one forward have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from torch import Tensor, nn

from lightning_revlib.nn.engine.saved_tensors import ContextFunction
from lightning_revlib.nn.state.base import CallState, Former, Scope, StateError
from lightning_revlib.nn.steps.step import Step

OnEntrance: TypeAlias = Callable[[Tensor, Tensor], None]


class Forward:
    """One forward of a stack, as its treatments see it.

    Args:
        blocks: the blocks of all steps, if they run in one go. None if a model's own code runs between the steps: state
            that calls have in common is captured for each step then.
        compiler: torch.compile's callback for the blocks, or None.
        context_fn: makes the contexts of a step's two runs, as in `torch.utils.checkpoint`.
        overlap: undo the step before on a stream of its own while a block's backward runs.
        batched: undo steps that save next to nothing together, see `Batched`.
        watch: gets the streams before the first reversible step that saves something, the last that backward rebuilds,
            and returns what to call when they are rebuilt.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module] | None = None,
        *,
        compiler: Any = None,
        context_fn: ContextFunction | None = None,
        overlap: bool = False,
        batched: bool = False,
        watch: Callable[[Tensor, Tensor], OnEntrance | None] | None = None,
    ) -> None:
        self.blocks, self.compiler, self.context_fn = blocks, compiler, context_fn
        self.overlap, self.batched = overlap, batched
        self.is_watched = False  # whether a drift will be measured
        self._watch = watch
        self._scope: Scope | None = None
        self._former: Former = {}

    def watch(self, a: Tensor, b: Tensor) -> OnEntrance | None:
        """Return what to call with the streams that backward has rebuilt of a and b, if anything."""
        on_entrance = None if self._watch is None else self._watch(a, b)
        self.is_watched |= on_entrance is not None
        return on_entrance

    def capture(self, step: Step, b: Tensor) -> CallState:
        """Return the state before a step's call on stream b.

        Raises RuntimeError, with the path of the stack, if a second run of its blocks would do harm.
        """
        return self._scope_of(step, b).capture(step.module, b, step.arguments(), step.key)

    def _scope_of(self, step: Step, stream: Tensor) -> Scope:
        if self._scope is None:
            try:
                self._scope = Scope([step.module] if self.blocks is None else self.blocks, stream, self._former)
            except StateError as error:
                raise RuntimeError(f"{step.path}: {error}") from error
        return self._scope

    def end_step(self) -> None:
        """Note that a step has run: if it runs by itself, nothing else has state in common with it."""
        if self.blocks is None:
            self.close()

    def close(self) -> None:
        """Note that the last step has run."""
        if self._scope is not None:
            self._scope.close()
            self._scope = None
