"""The engine: steps under ordinary autograd of which only the output is kept, and which backward undoes.

# NOTE [ How a stack forgets and remembers ]
1. Forward runs in grad mode. A `Frame` records one step: autograd gets a number for each tensor it saves, and the
   tensors are released when the step ends.
2. The `Tape` holds what comes out of the last step, until backward comes to the nodes that made it. A hook on them
   reads the last streams, and releases the output unless the graph is retained. Between the layers of a list it keeps
   the streams so far, as the model may leave the list there.
3. The first number that autograd hands back to a frame makes the tape rewind to it. All frames on the way are undone,
   also one that saved nothing and is never asked (`nn.Identity`); a `Schedule` may go on to frames below.
4. To undo a step: recover the stream that its block saw; run the block once more, with the state of the first run, and
   catch what it saves, in the same order; find the other stream by the coupling's inverse. One evaluation serves
   inversion and gradient: 4/3 of the plain FLOPs in all.
5. A recomputed tensor is given away when autograd asks for it, so that memory falls as the block's backward proceeds.
   Under `create_graph` all stay, as the second graph keeps them anyway.
6. References go from the graph to frames, from a frame to the next one and to the tape, never back. What nobody can
   ask for any more is freed without the garbage collector.
7. A backward that does not come through the output, such as that of a loss which a block returns besides its branch,
   finds no streams, and reads them from the output itself.

Gradients flow through the graph of the first run. The second run's graph only yields its saved tensors and is dropped:
hooks, DDP, FSDP and `autograd.grad` meet nothing unusual. Under `torch.compile` the engine stays eager, and each block
compiles by itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_revlib.nn.coupling.base import Coupling, Streams
from lightning_revlib.nn.engine import errors
from lightning_revlib.nn.engine.saved_tensors import ContextFunction, SavedTensors, catch, make_contexts
from lightning_revlib.nn.engine.schedule import Schedule
from lightning_revlib.nn.internals import graph_is_kept, graph_task
from lightning_revlib.nn.state.base import NOTHING, CallState, StateError
from lightning_revlib.nn.steps.step import Step


class Frame(SavedTensors):
    """One step of one forward: what autograd saved in it, by number, and what it takes to undo the step."""

    __slots__ = ("coupling", "index", "needs_grad", "next", "stride", "tape")
    is_rebuilt = True
    coupling: Coupling  # as bound to this call

    def __init__(self, tape: Tape, step: Step, state: CallState, a: Tensor, b: Tensor) -> None:
        super().__init__(step.again(), state)
        self.tape, self.index = tape, tape.add(self)
        self.needs_grad, self.stride = (a.requires_grad, b.requires_grad), b.stride()
        self.next: Frame | None = None

    def record(self, step: Step, a: Tensor, b: Tensor) -> Streams:
        """Run the step, leaving autograd with numbers, and return the streams after it. See rule 1."""
        tape = self.tape
        first, self.rerun = (NOTHING, NOTHING) if tape.context_fn is None else make_contexts(tape.context_fn)
        try:
            with self.hooks():
                self.coupling, streams = self.run(step, a, b, first)
        except StateError as error:
            raise errors.of_state(step, error) from error
        finally:
            self.end()
        return streams

    def run(self, step: Step, a: Tensor, b: Tensor, context: AbstractContextManager[Any]) -> tuple[Coupling, Streams]:
        """Run the block, within a context, and the coupling; return the latter, as bound, and the streams."""
        with context:
            f = step.evaluate(b, self.tape.compiler)
        self.state.close()  # before the coupling, which may draw, and does not run again
        return step.couple(a, b, f)

    def keep_next(self, frame: Frame) -> None:
        """Keep the frame of the next step alive, as backward has to undo it before this one. See rule 6."""
        self.next = frame

    def undo(self, out: Streams, before: Streams | None = None) -> Streams:
        """Return the streams before the step, given those after it, and have at hand what the step saves. See rule 4.

        If the streams `before` are known already, the step is only run again.
        """
        saved: list[Tensor] = []
        try:
            with self.state.restore():
                b = self.coupling.recover(*out) if before is None else before[1]
                # Laid out as in forward, and requiring grad as in forward: else the block would save other tensors.
                x = b.detach() if b.stride() == self.stride else b.new_empty_strided(b.shape, self.stride).copy_(b)
                x.requires_grad_(self.needs_grad[1])
                f = self.run_again(x, saved, self.tape.compiler)
                a = self._invert(out, b, f) if before is None else before[0]
                if len(saved) < len(self.sizes):  # the coupling saves tensors, too
                    with torch.enable_grad(), catch(saved):
                        self.coupling.forward(a.detach().requires_grad_(self.needs_grad[0]), x, f)
            self.keep(saved, self.tape.retain)
        except StateError as error:
            raise errors.of_state(self.step, error) from error
        finally:
            saved.clear()  # the second run's graph refers to this list
        return a, b

    def release_next(self) -> None:
        """Release what is left of the next step: it was saved for outputs that nobody uses."""
        if self.next is not None and not self.tape.retain:
            self.next.take_recomputed()

    def recompute(self) -> None:
        self.tape.rewind(self)

    @property
    def can_be_early(self) -> bool:
        """Whether the step may be undone before autograd asks for it: a context of a user's may free what it reads."""
        return bool(self.sizes) and self.rerun is NOTHING

    def _invert(self, out: Streams, b: Tensor, f: Any) -> Tensor:
        counts = out[0]._version, out[1]._version
        a = self.coupling.inverse(*out, b, f).detach()
        if (out[0]._version, out[1]._version) != counts:
            raise errors.inverse_modifies(self.step, self.coupling)
        return a


class Tape:
    """The frames of one forward, and the streams at the place to which backward has rewound them."""

    def __init__(
        self,
        compiler: Any = None,
        context_fn: ContextFunction | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.compiler = compiler  # torch.compile's callback at the time, for the blocks
        self.context_fn = context_fn  # makes contexts for each step's two runs
        self.schedule = Schedule() if schedule is None else schedule
        self.entrance: tuple[int, Callable[[Tensor, Tensor], None]] | None = None  # see `watch`
        self.frames: list[weakref.ref[Frame]] = []
        self.outputs: list[tuple[Tensor, int]] = []  # with their versions, until backward comes to them
        self.streams: Streams | None = None  # those before the frame of number `position`
        self.position = 0
        self.task, self.retain = -1, False  # the backward that has come to the outputs; whether it makes a graph
        self.lock = threading.RLock()  # backward on an accelerator runs in a thread of its own, beside the CPU's

    def add(self, frame: Frame) -> int:
        """Take the frame of the next step, and return its number."""
        self.frames.append(weakref.ref(frame))
        self.outputs.clear()  # which a list has kept, as its model might have left it
        return len(self.frames) - 1

    def watch(self, index: int, on_entrance: Callable[[Tensor, Tensor], None] | None) -> None:
        """Have `on_entrance` called with the streams before the step of that number, each time they are rebuilt."""
        self.entrance = None if on_entrance is None else (index, on_entrance)

    def keep(self, read: Callable[[list[Tensor]], Streams], *outputs: Tensor) -> None:
        """Keep what comes out of a step until the next step begins, or as long as the graph."""
        self.read = read
        self.outputs[:] = [(t.detach(), t._version) for t in outputs]

    def hold(self, read: Callable[[list[Tensor]], Streams], *outputs: Tensor, entry: Collection[Any] = ()) -> None:
        """Keep what comes out of the last step; `read` makes streams of the outputs. See rule 2.

        `entry` are the nodes of the streams before the first step, one of which may come out as it is: a backward that
        comes to such a node is perhaps of something else.
        """
        self.keep(read, *outputs)
        for node in (t.grad_fn for t in outputs):
            if node is not None and node not in entry:
                node.register_prehook(partial(_reach_output, weakref.ref(self), self.outputs))

    def start(self) -> None:
        """Read the last streams: a backward begins."""
        if not self.outputs:
            raise errors.output_freed()
        if any(t._version != count for t, count in self.outputs):
            raise errors.output_modified()
        with torch.no_grad():
            self.streams = self.read([t for t, _ in self.outputs])
        self.position, self.task = len(self.frames), graph_task()
        self.schedule.start()

    def rewind(self, frame: Frame) -> None:
        """Undo steps down to the frame's, which then has at hand what autograd asks for. See rule 3."""
        with self.lock:
            self.retain = torch.is_grad_enabled()  # under create_graph
            with torch.no_grad() if self.retain else NOTHING:
                self.schedule.rewind(self, frame)

    def undo_to(self, frame: Frame) -> None:
        """Undo the steps above the frame's, and the frame's."""
        if self.streams is None or self.position < frame.index:
            self.start()
        assert self.streams is not None
        if self.position == frame.index:  # all was given away, and is asked for again
            frame.undo(self.streams, before=self.streams)
        for index in reversed(range(frame.index, self.position)):
            each = self.frames[index]()
            assert each is not None  # each frame keeps the next one
            self.undo(each)
            each.release_next()

    def frame_below(self, frame: Frame) -> Frame | None:
        """Return the frame of the step before the frame's, if there is one, and autograd may ask for it."""
        return self.frames[frame.index - 1]() if frame.index else None

    def undo(self, frame: Frame) -> None:
        """Undo the last step that has not been undone yet, which is the frame's."""
        out, self.streams = self.streams, None  # after an error the next call starts afresh
        assert out is not None
        self.streams, self.position = frame.undo(out), frame.index
        if self.entrance is not None and frame.index == self.entrance[0]:
            self.entrance[1](*self.streams)

    def try_to_undo(self, frame: Frame) -> bool:
        """Undo the last step before it is asked for; return False, with nothing changed, if that fails."""
        streams, position = self.streams, self.position
        try:
            self.undo(frame)
        except Exception:
            frame.take_recomputed()
            self.streams, self.position = streams, position
            return False
        return True


def _reach_output(tape: weakref.ref[Tape], outputs: list[tuple[Tensor, int]], grads: Any) -> None:
    """Start a backward that has come to a node which made an output. The tape may have been freed before."""
    held = tape()
    if held is not None:
        with held.lock:  # other threads may differentiate the same graph
            if held.task != graph_task():
                held.start()
    if not graph_is_kept():
        outputs.clear()
