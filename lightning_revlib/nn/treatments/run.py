"""One forward of a stack, step by step, each by its treatment.

Both kinds of stack use it, `ReversibleSequential` in one call and `ReversibleModuleList` layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, clear_autocast_cache, nn

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.engine.saved_tensors import ContextFunction
from lightning_revlib.nn.state.base import Scope
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.base import TREATMENTS, Forward, OnEntrance, Treatment


class Run(Forward):
    """One forward: `step` for each step in turn, and after the last `close` or `join`.

    Args:
        treatments: the name of each step's treatment.
        blocks: the blocks of all steps, if they run in one go. None if a model's own code runs between the steps: state
            that calls have in common is captured for each step then.
        compiler: torch.compile's callback for the blocks, or None.
        context_fn: makes the contexts of a step's two runs, as in `torch.utils.checkpoint`.
        overlap: undo the step before on a stream of its own while a block's backward runs.
        keeps_casts: autocast keeps the weights of all steps as it has cast them, until it ends. Else they are freed
            after each step, and gradients of weights that steps share are added up in another precision.
        watch: gets the streams before the first of reversible steps, and returns what to call when they are rebuilt.
    """

    def __init__(
        self,
        treatments: Sequence[str],
        blocks: Iterable[nn.Module] | None = None,
        *,
        compiler: Any = None,
        context_fn: ContextFunction | None = None,
        overlap: bool = False,
        keeps_casts: bool = False,
        watch: Callable[[Tensor, Tensor], OnEntrance | None] = lambda a, b: None,
    ) -> None:
        self.treatments, self.blocks = treatments, blocks
        self.compiler, self.context_fn, self.overlap, self.keeps_casts = compiler, context_fn, overlap, keeps_casts
        self._watch = watch
        self.is_watched = False  # whether a drift will be measured
        self.index = 0  # of the next step
        self._scope: Scope | None = None
        self._segment: Treatment | None = None

    def step(self, step: Step, a: Tensor, b: Tensor) -> Streams:
        """Run the next step, and return the streams after it."""
        treatment = TREATMENTS[self.choose(step, a, b)]
        if not treatment.is_possible(step, a.device):
            treatment = TREATMENTS["store"]
        if type(self._segment) is not treatment:
            self._close_segment(a, b)
            self._segment = treatment(self, a, b)
        a, b = self._segment.step(step, a, b)
        self.index += 1
        if self.blocks is None:
            self._close_scope()
        if not self.keeps_casts:
            clear_autocast_cache()
        return a, b

    def choose(self, step: Step, a: Tensor, b: Tensor) -> str:
        """Return the name of the next step's treatment."""
        return self.treatments[self.index]

    def close(self, a: Tensor, b: Tensor) -> Streams:
        """End with the streams after the last step."""
        self._close_segment(a, b)
        self._close_scope()
        return a, b

    def join(
        self, a: Tensor, b: Tensor, join: Callable[[Tensor, Tensor], Tensor], halve: Callable[[Tensor, bool], Streams]
    ) -> Tensor:
        """End a stack whose output is both streams, joined: it is all that need be held."""
        y = join(a, b)
        if self._segment is not None:
            self._segment.close_joined(y, halve)
            self._segment = None
        self._close_scope()
        return y

    @property
    def rebuilds(self) -> bool:
        """Whether backward will rebuild the streams after the last step."""
        return self._segment is not None and self._segment.rebuilds

    def finish(self, y: Tensor) -> None:
        """Note the stack's output, the last thing that a forward makes."""

    def scope(self, step: Step, stream: Tensor) -> Scope:
        if self._scope is None:
            self._scope = Scope([step.module] if self.blocks is None else self.blocks, stream)
        return self._scope

    def watch(self, a: Tensor, b: Tensor) -> OnEntrance | None:
        on_entrance = self._watch(a, b)
        self.is_watched |= on_entrance is not None
        return on_entrance

    def _close_segment(self, a: Tensor, b: Tensor) -> None:
        if self._segment is not None:
            self._segment.close(a, b)
            self._segment = None

    def _close_scope(self) -> None:
        if self._scope is not None:
            self._scope.close()
            self._scope = None
