"""The engine: reversible steps under ordinary autograd, of which only the output is kept.

# NOTE [ How a stack forgets and remembers ]
1. Forward runs in grad mode, one `Frame` a step. While a step runs, `saved_tensors_hooks` hands
   autograd a number for every tensor it wants to save, and the tensor itself is let go.
2. What comes out passes through `Anchor`, an identity that saves it the ordinary way. Its backward
   is the first to run, and gives the streams to the `Tape`. Autograd frees the anchor like any
   other node, so that `retain_graph` and a second backward work. References go from the graph to
   frames, from a frame to the one above it and to the tape: no cycle, and nothing outlives the graph.
3. The first number that autograd hands back to a frame makes the tape rewind to it. All frames on
   the way are inverted, also one that saved nothing and is never asked (`nn.Identity`).
4. To rewind a frame: recover the stream its block saw; run the block once more in grad mode,
   catching the tensors it saves, in the same order; find the other stream by the coupling's
   inverse. One evaluation serves inversion and gradient: 4/3 of the plain FLOPs in all.
5. A caught tensor is given away when it is asked for: memory falls as the block's backward proceeds.
   What a norm has put out is not even caught, if it is large, but computed again when it is asked for: `Norms`.
   Under `create_graph` all are kept, as the second graph keeps them anyway.
6. A backward that does not come through the anchor, such as that of a loss which a block has
   returned besides its branch, finds no streams, and fetches what the anchor has saved by itself.

Under `torch.compile` the engine stays eager and each block compiles by itself: its second run is
compiled as the first was, whoever calls backward.

Gradients flow through the graph of the forward. The second graph only yields its saved tensors and
is dropped, so that hooks, DDP, FSDP and `autograd.grad` meet nothing unusual.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import set_eval_frame, skip_code
from torch.autograd.graph import saved_tensors_hooks

from lightning_revlib.nn.coupling import Coupling, Streams
from lightning_revlib.nn.norms import Norms
from lightning_revlib.nn.replay import Buffers, Environment, RandomState, Settings, parts

if TYPE_CHECKING:
    from lightning_revlib.nn.step import Step

# What `saved_tensors_hooks` does, less its objects and calls: a tenth of what a small block's step costs beside it.
catch = torch._C._autograd._push_saved_tensors_default_hooks
release = torch._C._autograd._pop_saved_tensors_default_hooks
set_grad_enabled = torch._C._set_grad_enabled

# By `map`, attributes of many tensors or modules are read without interpreting a line for each.
NBYTES, VERSION, BUFFERS = attrgetter("nbytes"), attrgetter("_version"), attrgetter("_buffers")


class Frame:
    """One step of one forward, and what it takes to run it again."""

    __slots__ = ("a_needs_grad", "above", "again", "b_needs_grad", "buffers", "calls_autograd", "caught", "changed",
                 "coupling", "index", "norms", "random", "running", "saved", "saved_by_block", "step", "stride", "tape",
                 "versions")  # fmt: skip

    a_needs_grad: bool
    b_needs_grad: bool
    coupling: Coupling  # bound to this step
    saved: list[int]  # the bytes of each tensor that autograd wanted to save
    saved_by_block: int  # how many of them; the coupling saved the others

    def __init__(self, tape: Tape, index: int, step: Step, b: Tensor) -> None:
        self.tape, self.index, self.step, self.stride = tape, index, step, b.stride()
        self.above: Frame | None = None
        self.random: RandomState | None = None  # set if the step draws
        self.buffers: Buffers | None = None  # set if it has any
        self.again: Any = None  # the second run's context
        self.calls_autograd = False  # the block does, itself
        self.changed: torch.Size | None = None  # the shape of a tensor that was modified after it was saved
        self.running: list[Tensor] = []  # what is saved until the step ends, for a block that calls autograd itself
        self.versions: list[int] = []  # theirs, when they were saved
        self.norms: Norms | None = None  # those of the second run, if its tensors are large
        self.caught: list[Tensor | None] | None = None  # what the second run has saved, each until it is asked for

    def replay(self, b: Tensor, out: Streams, a: Tensor | None = None) -> Tensor:
        """Run the step again on stream b, catching, and return stream a, found from the streams after the step."""
        step, tape = self.step, self.tape
        caught: list[Tensor] = []
        pack: Any = partial(_append, caught) if self.calls_autograd else caught.append
        unpack = caught.__getitem__
        undo = self._lend(b) if tape.settings_changed or self.buffers or self.random else []
        norms = None
        if b.nbytes >= Norms.SMALLEST and not (tape.keep or tape.settings_changed or tape.compiler):
            norms = Norms(step.module)
            undo.append(norms.watch())
        try:
            # Laid out as in forward, and requiring grad as in forward: else the block would save other tensors.
            again = b.detach()
            if again.stride() != self.stride:
                again = again.new_empty_strided(b.shape, self.stride).copy_(b)
            again.requires_grad_(self.b_needs_grad)
            catch(pack, unpack)
            set_grad_enabled(True)
            try:
                f, _ = self._branch(again, self.again) if self.again else step.branch(again, tape.compiler)
            finally:
                set_grad_enabled(False)
                release()
            if a is None:
                a = self.coupling.inverse(*out, b, None if f is None else f.detach())  # type: ignore[arg-type]
            if len(self.saved) > self.saved_by_block:  # the coupling saves tensors, too
                with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
                    self.coupling.forward(a.detach().requires_grad_(self.a_needs_grad), again, f)
        finally:
            tensors = [*caught]
            caught.clear()  # the second graph refers to this list
            while undo:
                undo.pop()()
        if self.changed is not None or list(map(NBYTES, tensors)) != self.saved:
            self._complain(tensors)
        self.caught, self.norms = tensors, norms  # type: ignore[assignment]
        if norms and not self.calls_autograd:
            norms.forget(self.caught)  # type: ignore[arg-type]
        return a

    def _branch(self, b: Tensor, context: Any) -> tuple[Any, Any]:
        with context:
            return self.step.branch(b, self.tape.compiler)

    def repeat(self, a: Tensor, b: Tensor) -> Streams:
        """The step's forward again, without graph or trace, to learn whether it draws."""
        random, undo = RandomState(b), self._lend(b)
        try:
            f, _ = self.step.branch(b, self.tape.compiler)
            self.step.bind(a, b)  # it may draw, too
            streams = self.coupling.forward(a, b, f)
        finally:
            while undo:
                undo.pop()()
        self.random = None if RandomState(b).same(random) else random
        return streams

    def _lend(self, b: Tensor) -> list[Callable[[], Any]]:
        undo = self.tape.settings.lend(parts(self.step.module)) if self.tape.settings_changed else []
        if self.buffers:
            undo.append(self.buffers.lend())
        if self.random:
            undo.append(self.random.lend(b))
        return undo

    def _pack(self, tensor: Tensor) -> int:
        self.running.append(tensor)
        self.versions.append(tensor._version)
        return len(self.versions) - 1

    def _unpack(self, number: int) -> Tensor:
        caught = self.caught
        if caught is None or (tensor := caught[number]) is None:
            return self._find(number)
        if not self.tape.keep:
            caught[number] = None
        return tensor

    def _find(self, number: int) -> Tensor:
        """What autograd asks for where nothing is caught, or no more."""
        if self.running:
            self.calls_autograd = True
            return self.running[number]
        if self.norms and (tensor := self.norms.again(number)) is not None:
            return tensor
        self.tape.rewind(self)
        return self._unpack(number)

    def _complain(self, again: list[Tensor]) -> None:
        if self.changed is not None:
            raise RuntimeError(
                f"{self.step.name}: a tensor of shape {list(self.changed)} needed for its gradient has been modified by"
                " an inplace operation inside the block; use the operation that is not in-place"
            )
        pairs = enumerate(zip(self.saved, again))  # noqa: B905
        lines = [
            f"{self.step.name} computes something else in backward than it did in forward: it saved"
            f" {len(self.saved)} tensors for its gradient, and {len(again)} when recomputed.",
            *[f"  {i}: saved {x:,} bytes, recomputed {_show(t)}" for i, (x, t) in pairs if x != t.nbytes][:3],
            "A block must depend on its input, arguments, parameters, registered buffers and torch's generators only.",
        ]
        raise RuntimeError("\n".join(lines))


def _append(tensors: list[Tensor], tensor: Tensor) -> int:
    tensors.append(tensor)
    return len(tensors) - 1


# Autograd calls these while a compiled block runs: they are not to be compiled themselves.
for function in (Frame._pack, Frame._unpack, _append):
    skip_code(function.__code__)


class Tape:
    """The streams at the place to which backward has rewound the frames of one forward."""

    def __init__(
        self,
        read: Callable[[tuple[Tensor, ...]], Streams],
        arrived: Callable[[Tensor, Tensor], None],
        compiler: Any = None,
        context_fn: Callable[[], tuple[Any, Any]] | None = None,
    ) -> None:
        self.read = read  # the anchor's tensors -> streams
        self.arrived = arrived  # called with the streams of the entrance, each time they are rebuilt
        self.compiler = compiler  # torch.compile's callback at the time, for the blocks
        self.context_fn = context_fn
        self.settings_changed = False  # since the forward
        self.unusual = False  # the environment has changed, or it is not known which steps draw
        self.streams: Streams | None = None
        self.position = self.depth = 0  # the streams are those before the frame of this index
        self.keep = False  # caught tensors are not given away
        self.drew = False  # whether any step has drawn random numbers
        self.surprise: tuple[Frame, RandomState, Streams] | None = None  # it has, and it is not known which
        self.output: list[tuple[Tensor, int]] = []  # what the anchor saves, until its backward
        self.anchor: weakref.ref[Any] | None = None
        self.environment: Environment  # this and the next by `Recording`
        self.settings: Settings
        self.lock = threading.RLock()  # CUDA backward runs in threads of its own

    def fix(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Pass what came out through the anchor; `read` must give the last streams from it."""
        self.output = [(t.detach(), t._version) for t in tensors]
        return Anchor.apply(self, *tensors)

    def start(self, tensors: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            self.streams = self.read(tensors)
        self.position = self.depth
        self.settings_changed = self.settings.changed()
        self.unusual = self.surprise is not None or self.environment.changed()

    def rewind(self, frame: Frame) -> None:
        """Undo steps down to the frame's, which then has caught what autograd asks for."""
        compiler = set_eval_frame(None)
        try:
            with self.lock:
                if self.streams is None or self.position < frame.index:
                    self.start(self._output())
                self.keep = torch.is_grad_enabled()  # create_graph
                if self.position == frame.index + 1 and not (self.keep or self.unusual):
                    self._undo(frame)
                else:
                    with torch.no_grad(), self.environment.again():
                        self._rewind(frame)
        finally:
            if compiler is not None:
                set_eval_frame(compiler)

    def _rewind(self, frame: Frame) -> None:
        if self.surprise:
            self._find_draws(*self.surprise)
        if self.position == frame.index:  # all was caught and given away: autograd asks a second time
            assert self.streams is not None
            (a, b), self.streams = self.streams, None
            frame.replay(b, (a, b), a)
            self.streams = a, b
        for each in reversed(self._between(frame)):
            self._undo(each)

    def _undo(self, frame: Frame) -> None:
        out, self.streams = self.streams, None  # after an error the next call starts afresh
        assert out is not None
        b = frame.coupling.recover(*out)
        a = frame.replay(b, out)
        self.streams, self.position = (a, b), frame.index
        if frame.above is not None and not self.keep:
            frame.above.caught = frame.above.norms = None  # what is left was saved for an output that nobody uses
        if not frame.index:
            self.arrived(a, b)

    def _between(self, frame: Frame) -> list[Frame]:
        """The frames from `frame` up to the tape's position."""
        frames, above = [], frame if frame.index < self.position else None
        while above is not None and above.index < self.position:
            frames.append(above)
            above = above.above
        return frames

    def _output(self) -> tuple[Tensor, ...]:
        if self.output:
            if any(t._version != count for t, count in self.output):
                raise RuntimeError("the output of a reversible stack has been modified by an inplace operation")
            return tuple(t for t, _ in self.output)
        anchor = self.anchor() if self.anchor else None
        if anchor is None:
            raise RuntimeError("backward through a reversible stack a second time, after its output has been freed")
        return anchor.saved_tensors

    def _find_draws(self, frame: Frame | None, start: RandomState, streams: Streams) -> None:
        self.surprise = None
        restore = start.lend(streams[0])
        try:
            while frame is not None:
                streams = frame.repeat(*streams)
                frame = frame.above
        finally:
            restore()


class Recording:
    """One forward onto a tape, step by step, for a stack whose steps may be called by others.

    If steps are expected to draw random numbers, the generators are looked at after each; else at the end only: if they
    have drawn unexpectedly, the entrance is kept this once, for backward to find out where. The frames live here until
    `close`, as the tape must not refer to them.
    """

    def __init__(self, tape: Tape, a: Tensor, b: Tensor, expect_draws: bool, modules: list[nn.Module]) -> None:
        self.tape, self.expect_draws = tape, expect_draws
        self.start = self.random = RandomState(a)
        self.entrance = a.detach(), b.detach()
        self.frames: list[Frame] = []
        tape.environment = Environment(a.device.type)
        self.modules, self.buffers = modules, any(map(BUFFERS, modules))

    def step(self, step: Step, a: Tensor, b: Tensor) -> Streams:
        tape, frames = self.tape, self.frames
        frame = Frame(tape, len(frames), step, b)
        if frames:
            frames[-1].above = frame
        frames.append(frame)
        saved, count = frame.running, b._version
        frame.a_needs_grad, frame.b_needs_grad = a.requires_grad, b.requires_grad
        if self.buffers and any(map(BUFFERS, modules := parts(step.module))):
            frame.buffers = Buffers(modules)
        try:
            catch(frame._pack, frame._unpack)
            try:
                if tape.context_fn is None:
                    f, step.extra = step.branch(b, tape.compiler)
                else:
                    first, frame.again = tape.context_fn()
                    f, step.extra = frame._branch(b, first)
                step.check(b, f, count)
                frame.saved_by_block = len(saved)
                frame.coupling = step.coupling.at(a, b, step.stack.training)
                a, b = step.couple(frame.coupling, a, b, f)
            finally:
                release()
            frame.saved = list(map(NBYTES, saved))
            if list(map(VERSION, saved)) != frame.versions:
                frame.changed = next(t.shape for t, v in zip(saved, frame.versions, strict=True) if t._version != v)
        finally:
            frame.running, frame.versions = [], []
        if frame.buffers:
            frame.buffers.close()
        if self.expect_draws and not (now := RandomState(a)).same(self.random):
            frame.random, self.random, tape.drew = self.random, now, True
        return a, b

    def close(self) -> None:
        self.tape.depth = len(self.frames)
        steps = [frame.step for frame in self.frames]
        unique = {id(t): t for step in steps if step.args or step.kwargs for t in step.tensors()}
        self.tape.settings = Settings(self.modules, list(unique.values()))
        if not self.expect_draws and not RandomState(self.entrance[0]).same(self.start):
            self.tape.drew, self.tape.surprise = True, (self.frames[0], self.start, self.entrance)


class Anchor(torch.autograd.Function):
    """The identity on what a stack puts out; the only place where its tensors are kept."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.tape, tape.anchor = tape, weakref.ref(ctx)
        return tensors

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.tape.start(ctx.saved_tensors)
        ctx.tape.output = []
        return None, *grads


def _show(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}, {tensor.nbytes:,}"
