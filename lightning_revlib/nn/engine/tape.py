"""The engine: reversible steps under ordinary autograd, of which only the output is kept.

# NOTE [ How a stack forgets and remembers ]
1. Forward runs in grad mode, one `Frame` a step. While a step runs, `saved_tensors_hooks` hands
   autograd a number for every tensor it wants to save, and the tensor itself is let go: at once, or, in
   a stack's first call and if blocks call autograd themselves, when the step ends.
2. What comes out is held by the `Tape`, until backward comes to the nodes that put it out: a hook on them gives
   the tape its streams, and lets go of the output unless the graph is retained. References go from the graph
   to frames, from a frame to the one above it and to the tape: no cycle, and the streams that were
   rebuilt last are let go with the last thing that a step has saved.
3. The first number that autograd hands back to a frame makes the tape rewind to it. All frames on
   the way are inverted, also one that saved nothing and is never asked (`nn.Identity`).
4. To rewind a frame: recover the stream its block saw; run the block once more in grad mode,
   catching the tensors it saves, in the same order; find the other stream by the coupling's
   inverse. One evaluation serves inversion and gradient: 4/3 of the plain FLOPs in all. If nobody asks for the streams
   at the entrance, the first step's run ends with the last tensor that it saves.
5. A caught tensor is given away when it is asked for: memory falls as the block's backward proceeds.
   What a norm has put out is not even caught, if it is large, but computed again when it is asked for: `Norms`.
   Under `create_graph` all are kept, as the second graph keeps them anyway.
6. Steps that save next to nothing are undone several at once: a processor that changes from one block's forward to its
   backward all the time finds neither in its caches.
7. A backward that does not come through the output, such as that of a loss which a block has
   returned besides its branch, finds no streams, and takes them from the output by itself.

Under `torch.compile` the engine stays eager and each block compiles by itself: its second run is
compiled as the first was, whoever calls backward.

Gradients flow through the graph of the forward. The second graph only yields its saved tensors and
is dropped, so that hooks, DDP, FSDP and `autograd.grad` meet nothing unusual.
"""

from __future__ import annotations

import weakref
from _thread import RLock  # as `threading` has it, without a function of Python's round it
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._dynamo.eval_frame import set_eval_frame

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.engine.frame import Frame
from lightning_revlib.nn.engine.saved_tensors import set_grad_enabled
from lightning_revlib.nn.state.parameters import Settings
from lightning_revlib.nn.state.rng import NOTHING, Environment, RandomState
from lightning_revlib.nn.steps.chunks import Undoing, join
from lightning_revlib.nn.treatments.prefetch import Ahead

Output: TypeAlias = list[tuple[Tensor, int]]  # tensors with their versions


class Tape:
    """The streams at the place to which backward has rewound the frames of one forward."""

    AT_ONCE = 256 * 1024  # bytes that steps undone in one go may hold

    environment: Environment  # of the first step, by a `Recording`

    def __init__(
        self,
        read: Callable[[Output], Streams],
        arrived: Callable[[Tensor, Tensor], None] | None,
        compiler: Any = None,
        context_fn: Callable[[], tuple[Any, Any]] | None = None,
    ) -> None:
        self.read = read  # what came out -> streams
        self.arrived = arrived  # called with the streams of the entrance each time, which else need not be rebuilt
        self.compiler = compiler  # torch.compile's callback at the time, for the blocks
        self.context_fn = context_fn
        self.passed: dict[int, Streams] = {}  # those before others that backward has come to
        self.output: Output = []  # what came out, until backward comes to it
        self.lock = RLock()  # backward of an accelerator runs in a thread of its own, beside the CPU's
        self.unusual = False  # the environment has changed, or it is not known which steps draw
        self.streams: Streams | None = None
        self.position = self.depth = 0  # the streams are those before the frame of this index
        self.at_once = 0  # that number, or 0: one by one
        self.undoing: Undoing | None = None  # the step of which some chunks are undone, but not all
        self.keep = False  # caught tensors are not given away
        self.drew = False  # whether any step has drawn random numbers
        self.norms_from: int | None = None  # norms of steps that save more bytes than that are computed again
        self.surprise: tuple[Frame, RandomState, Streams] | None = None  # it has, and it is not known which
        self.task = -1  # the backward that has come to the output
        self.looked = -1  # the one for which it is known what has changed
        self.ahead: Ahead | None = None  # if steps are undone before autograd asks for them
        self.changed: Settings | None = None  # the settings of all steps, if they are others than in forward
        self.varied = False  # the environment has changed from one step to the next
        self.settings: Settings | None = None  # when forward ended, if steps have none of their own

    def hold(self, *tensors: Tensor) -> None:
        """Keep what came out; `read` must give the last streams from it."""
        hook = partial(_arrive, weakref.ref(self), self.output)
        for t in tensors:
            self.output.append((t.detach(), t._version))
            if t.grad_fn is not None:
                t.grad_fn.register_prehook(hook)

    def start(self) -> None:
        if not self.output:
            raise RuntimeError("backward through a reversible stack a second time, after its output has been freed")
        for t, count in self.output:
            if t._version != count:
                raise RuntimeError(
                    "the output of a reversible stack has been modified by an inplace operation, and backward has to"
                    " begin with it; use the operation that is not in-place on it, such as y = y + 1 for y += 1"
                )
        grad = torch.is_grad_enabled()
        set_grad_enabled(False)
        try:
            self.streams = self.read(self.output)
        finally:
            set_grad_enabled(grad)
        self.position, self.undoing, self.passed = self.depth, None, {}
        if self.ahead is not None:
            self.ahead.start()
        self.task = torch._C._current_graph_task_id()
        self._look(self.task)

    def _look(self, task: int) -> None:
        """See, once in each backward, what is otherwise than in forward."""
        self.changed = self.settings if self.settings is not None and self.settings.changed() else None
        self.unusual = self.varied or self.surprise is not None or self.environment.changed()
        self.looked = task

    def rewind(self, frame: Frame) -> None:
        """Undo steps down to the frame's, which then has caught what autograd asks for."""
        compiler = set_eval_frame(None)
        try:
            with self.lock:
                if (self.streams is None or self.position <= frame.index) and self._before(frame) is None:
                    self.start()
                elif self.looked != (task := torch._C._current_graph_task_id()):
                    self._look(task)
                self.keep = torch.is_grad_enabled()  # create_graph
                if self.position == frame.index + 1 and not (self.keep or self.unusual or self.ahead):
                    self._undo(frame)
                    if self.at_once and (left := self.at_once - sum(frame.saved)) > 0:
                        self._undo_small(frame, left)
                else:
                    with torch.no_grad(), self.environment.again():
                        self._rewind(frame)
        finally:
            if compiler is not None:
                set_eval_frame(compiler)

    def _rewind(self, frame: Frame) -> None:
        if self.surprise:
            self._find_draws(*self.surprise)
        if self.ahead is None or not self.ahead.take(frame):
            if (before := self._before(frame)) is not None:  # all was caught and given away: it is asked a second time
                with frame.environment.again() if frame.environment else NOTHING:
                    frame.replay(before[1], before, before[0])
            for each in reversed(self._between(frame)):
                with each.environment.again() if each.environment else NOTHING:
                    self._undo(each)
        if self.ahead is not None and self.position == frame.index and not self.keep:
            self.ahead.begin(self, frame)

    def _before(self, frame: Frame) -> Streams | None:
        """The streams before the frame's step, if they are there."""
        return self.streams if self.position == frame.index and frame.chunk is None else self.passed.get(frame.index)

    def _undo(self, frame: Frame, *, ahead: bool = False) -> None:
        """Undo the step at whose end the tape is; `ahead` of the backward of the step above it."""
        out, self.streams = self.streams, None  # after an error the next call starts afresh
        assert out is not None
        if frame.chunk is None:
            b = frame.coupling.recover(*out)
            a = frame.replay(b, out)
        else:
            self.undoing = self.undoing or Undoing(out)
            a, b = self.undoing.undo(frame)
        self.streams, self.position = (a, b), frame.index
        if not ahead:
            self.leave(frame)
        if frame.chunk is not None:
            self.passed = {frame.index: (frame.chunk.of(a), frame.chunk.of(b))}
            if frame.chunk.number:  # the others are still to come
                self.streams = out
            else:
                self.undoing = None
        if not frame.index and self.arrived is not None:
            self.arrived(a, b)

    def _undo_small(self, frame: Frame, left: int) -> None:
        """Undo the steps below the frame's, too, while what all of them hold is next to nothing."""
        while left > 0 and frame.below is not None and (below := frame.below()) is not None:
            assert self.streams is not None
            left -= sum(below.saved) + self.streams[0].nbytes
            if left < 0 or frame.chunk is not None or below.chunk is not None:
                return
            self.passed[frame.index] = self.streams
            self._undo(below, ahead=True)
            frame = below

    def leave(self, frame: Frame) -> None:
        """Backward comes to the frame: what is left above it was saved for outputs that nobody uses."""
        above, more = None if self.keep else frame.above, len(self.passed)
        while above is not None:
            above.caught = above.norms = None
            above, more = above.above if more else None, more - 1
        if self.passed:
            self.passed = {}

    def _between(self, frame: Frame) -> list[Frame]:
        """The frames from `frame` up to the tape's position."""
        frames, above = [], frame if frame.index < self.position else None
        while above is not None and above.index < self.position:
            frames.append(above)
            above = above.above
        return frames

    def _find_draws(self, frame: Frame | None, start: RandomState, streams: Streams) -> None:
        self.surprise = None
        restore = start.lend(streams[0])
        try:
            done: list[Streams] = []  # the chunks of a step
            while frame is not None:
                chunk = frame.chunk
                if chunk is None:
                    streams = frame.repeat(*streams)
                else:
                    done.append(frame.repeat(chunk.of(streams[0]), chunk.of(streams[1])))
                    if frame.above is None or frame.above.step is not frame.step:
                        streams = join(done, 0, chunk.dim), join(done, 1, chunk.dim)
                        done = []
                frame = frame.above
        finally:
            restore()


def _arrive(tape: weakref.ref[Tape], output: Output, grads: Any) -> None:
    """Backward has come to a node that put out what a tape holds: to the first, if the task is new to it."""
    held, task = tape(), torch._C._current_graph_task_id()
    if held is not None and held.task != task:
        held.start()
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        output.clear()
