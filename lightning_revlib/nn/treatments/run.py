"""One forward of a stack, step by step, each by its treatment.

Both kinds of stack use it, `ReversibleSequential` in one call and `ReversibleModuleList` layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, clear_autocast_cache

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.base import TREATMENTS, Treatment
from lightning_revlib.nn.treatments.forward import Forward


class Run:
    """One forward: `step` for each step in turn, and after the last `close` or `join`.

    Args:
        treatments: the name of each step's treatment.
        forward: what they have in common.
        keeps_casts: autocast keeps the weights of all steps as it has cast them, until it ends. Else they are freed
            after each step, and gradients of weights that steps share are added up in another precision.
    """

    def __init__(self, treatments: Sequence[str], forward: Forward, *, keeps_casts: bool = False) -> None:
        self.treatments, self.forward, self.keeps_casts = treatments, forward, keeps_casts
        self.index = 0  # of the next step
        self._segment: Treatment | None = None  # of steps in a row; it must not refer to this

    def step(self, step: Step, a: Tensor, b: Tensor) -> Streams:
        """Run the next step, and return the streams after it."""
        treatment = TREATMENTS[self.choose(step, a, b)]
        if not treatment.is_possible(step, a.device):
            treatment = TREATMENTS["store"]
        if type(self._segment) is not treatment:
            self._close_segment(a, b)
            self._segment = treatment(self.forward, a, b)
        a, b = self._segment.step(step, a, b)
        self.index += 1
        self.forward.end_step()
        if not self.keeps_casts:
            clear_autocast_cache()
        return a, b

    def choose(self, step: Step, a: Tensor, b: Tensor) -> str:
        """Return the name of the next step's treatment."""
        return self.treatments[self.index]

    def pause(self, a: Tensor, b: Tensor) -> None:
        """Note that there may be no further step, as a model may leave a list early."""
        assert self._segment is not None
        self._segment.pause(a, b)

    def close(self, a: Tensor, b: Tensor) -> Streams:
        """End with the streams after the last step."""
        self._close_segment(a, b)
        self.forward.close()
        return a, b

    def join(
        self, a: Tensor, b: Tensor, join: Callable[[Tensor, Tensor], Tensor], halve: Callable[[Tensor, bool], Streams]
    ) -> Tensor:
        """End a stack whose output is both streams, joined: it is all that need be held."""
        y = join(a, b)
        if self._segment is not None:
            self._segment.close_joined(y, halve)
            self._segment = None
        self.forward.close()
        return y

    def finish(self, y: Tensor) -> None:
        """Note the stack's output, the last thing that a forward makes."""

    def _close_segment(self, a: Tensor, b: Tensor) -> None:
        if self._segment is not None:
            self._segment.close(a, b)
            self._segment = None
