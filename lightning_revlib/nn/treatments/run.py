"""How a reversible stack executes its steps: the tape where they are undone, checkpoint or autograd where not.

Both kinds of stack use it, `ReversibleSequential` in one call and `ReversibleModuleList` layer by layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, clear_autocast_cache
from torch.utils._pytree import tree_leaves

from lightning_revlib.nn.coupling.base import Streams, has_gaps
from lightning_revlib.nn.coupling.standard import Additive, Invertible
from lightning_revlib.nn.engine import release as alone
from lightning_revlib.nn.engine.drift import Sentinel
from lightning_revlib.nn.engine.recording import Recording
from lightning_revlib.nn.engine.tape import Output, Tape
from lightning_revlib.nn.plan.budget import Signature
from lightning_revlib.nn.plan.profile import Measuring
from lightning_revlib.nn.stacks.options import Treatment
from lightning_revlib.nn.steps.chunks import ChunkedStep
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.checkpoint import Checkpoint, around, checkpoint
from lightning_revlib.nn.treatments.offload import Convoy, Parcel
from lightning_revlib.nn.treatments.prefetch import Ahead, has_streams
from lightning_revlib.nn.treatments.selective import keep_heavy

CALLS_AUTOGRAD = attrgetter("calls_autograd")
LEARNT = ("_calls_autograd", "_counts")


class Execution:
    """One forward of a stack. `step` for each step in turn, and behind the last `close` or `close_joined`."""

    index = 0
    views = False  # whether the streams are views of the stack's input
    lent = False  # whether its owner holds that
    planned: Sequence[Treatment] | None = None  # else each step says its own
    recording: Recording | None = None
    undoes = False  # whether there has been a recording
    watches = False  # whether blocks have run that backward will run again
    drew = False
    convoy: Convoy | None = None  # if steps are offloaded
    parcel: Parcel | None = None  # of the last step, if it was
    measuring: Measuring | None = None  # if a memory plan needs figures first

    def __init__(self, stack: Any, compiler: Any, count: int, *, watched: bool = True) -> None:
        self.stack, self.compiler, self.count, self.watched = stack, compiler, count, watched
        self.uniform = (  # all steps are undone
            stack.budget is None
            and stack.chunks == (1,)
            and len(stack.couplings) == 1
            and set(stack.treatments) == {"reversible"}
            and stack.couplings[0].invertible(stack.training)
        )
        # Autocast keeps weights as it has cast them until it ends: those of all steps. Without, gradients of weights
        # that steps share are added up in another precision, and are not the same to the last bit.
        self.recasts = stack.grid_bits is None or stack.budget is not None
        if stack.training and not stack._learnt_training:  # in evaluation blocks may do less
            stack.__dict__.update((name, None) for name in LEARNT if getattr(stack, name) is False)
        self.rebuilt: dict[Sentinel, Streams] = {}

    def step(self, step: Step, a: Tensor, b: Tensor) -> Streams:
        """Run the next step. If all are undone, this is `Recording.step` from the second on."""
        a, b = self._planned_step(step, a, b)
        if self.recasts:
            clear_autocast_cache()
        return a, b

    def _planned_step(self, step: Step, a: Tensor, b: Tensor) -> Streams:
        if self.index == 0 and self.stack.budget is not None and set(self.stack.treatments) == {"reversible"}:
            if around(False) is None:
                self._begin_plan(step, a, b)
            else:
                warnings.warn(
                    f"{self.stack.path}: within a block that backward runs again, or other saved-tensor hooks, its"
                    f" memory_budget={self.stack.budget.value!r} is not followed: all steps are reversible",
                    stacklevel=2,
                )
        if self.measuring is not None:
            self.measuring.add(step, a, b, last=self.index == self.count - 1)
        treatment = self.planned[self.index] if self.planned else step.treatment
        self.index += 1
        return self._step(step, treatment, a, b)

    def _step(self, step: Step, treatment: Treatment, a: Tensor, b: Tensor) -> Streams:
        """One that is undone stays open for the next; other steps first close what is."""
        if treatment != "offload" and self.parcel is not None:
            self._end_offload()
        if treatment == "reversible" and step.coupling.invertible(self.stack.training):
            if self.recording is not None:
                return self._record(step, a, b)
            if self.views:  # of the stream that the block does not see one will do, if the coupling only reads it
                a, b = a if type(step.coupling) is Additive else dense(a), dense(b)
            if a.is_inference():  # it would not count its changes
                a, b = a.clone(), b.clone()
            tape = Tape(_pair, _ignore, self.compiler, self.stack.context_fn)
            if self.stack.overlap and has_streams(a.device):
                tape.ahead = Ahead(a.device)
            elif a.nbytes < Tape.AT_ONCE and self.stack.budget is None and self.stack.context_fn is None:
                tape.at_once = 0 if _is_distributed() else Tape.AT_ONCE
            self.recording = Recording(tape, self.stack, a, b, recasts=self.uniform and self.recasts)
            if self.uniform:
                self.step = self.recording.step  # type: ignore[method-assign]
            if self.watched and self.stack.on_drift != "ignore":
                tape.arrived = partial(self.stack._arrived, Sentinel(*self.recording.entrance), self.rebuilt)
            elif self.watched and not _is_distributed():
                tape.arrived = None
            self.views, self.undoes, self.watches = False, True, True
            return self._record(step, a, b)
        if self.views and not self.lent:
            a, b = dense_streams(a, b)
        self.views = False
        a, b = self.close(a, b)
        if treatment == "offload" and has_streams(a.device):
            self.convoy = self.convoy or Convoy(a.device)
            self.parcel = Parcel(self.convoy, step.module, self.parcel)
            return self.parcel.run(step, a, b, self.compiler)
        contexts = keep_heavy if treatment == "selective" else self.stack.context_fn and self._contexts
        again = treatment in ("checkpoint", "selective") and not isinstance(step.coupling, Invertible)
        self.watches |= again
        return step.run(a, b, self.compiler, partial(checkpoint, step, contexts) if again else None)

    def _contexts(self, call: Checkpoint) -> tuple[Any, Any]:
        return self.stack.context_fn()

    def _record(self, step: Step, a: Tensor, b: Tensor) -> Streams:
        assert self.recording is not None
        if isinstance(step, ChunkedStep):
            return step.record(self.recording, a, b)
        return self.recording.step(step, a, b)

    def _begin_plan(self, step: Step, a: Tensor, b: Tensor) -> None:
        """Take the treatments from the memory plan, or measure for it, running all steps reversibly meanwhile."""
        arguments = tree_leaves((step.args, step.kwargs))
        tensors = [t for t in arguments if isinstance(t, Tensor)]
        kind = a.device.type
        environment = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.signature = Signature(
            tuple(t.shape for t in (a, b, *tensors)),
            (
                a.dtype,
                step.dtype,
                a.requires_grad,
                b.requires_grad,
                kind,
                environment,
                self.views and self.lent,
                *[t.dtype for t in tensors],
                *[x for x in arguments if isinstance(x, (bool, str, type(None)))],  # a number may count steps
                *[m.training for m in self.stack.modules()],
                *[(p.shape, p.requires_grad) for p in self.stack.parameters()],
                *[type(m).__qualname__ for m in self.stack.modules()],
            ),
        )
        treatments = self.stack.budget.treatments(self.stack.path, self.signature, self.stack)
        if treatments is None:
            self.measuring = Measuring(self.stack, self._alone)
        self.planned = treatments or ["reversible"] * self.count

    def _alone(self, step: Step, treatment: Treatment, last: bool, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """The step as in a stack that has it alone, or with steps behind it; `step.extra` is left to the caller."""
        execution = Execution(self.stack, None, 1, watched=False)
        execution.views, execution.lent = self.views, self.lent
        clear_autocast_cache()
        a, b = execution._step(step, treatment, a, b)
        clear_autocast_cache()
        execution._end_offload()
        if last and self.stack.split_dim is not None:
            return (execution.close_joined(a, b),)
        a, b = execution.close(a, b)
        return (self.stack._join(a, b),) if last else (a, b)

    def end(self, y: Tensor) -> None:
        """Behind the last step, with the stack's output: make the plan, if its figures were measured."""
        if self.parcel is not None:
            self._end_offload()
        if not self.undoes or self.stack.on_drift == "ignore":
            self.stack.__dict__.pop("_rebuilt", None)  # backward will measure nothing
        if self.watches:
            for name in LEARNT:
                if getattr(self.stack, name) is None:
                    self.stack.__dict__[name] = False
            if self.stack.training and not self.stack._learnt_training:
                self.stack.__dict__["_learnt_training"] = True
        if self.measuring is not None:
            self.stack.budget.add(self.stack.path, self.signature, self.measuring.steps, y.nbytes)

    def _end_offload(self) -> None:
        if self.parcel is not None:
            self.parcel.end()
            self.parcel = None

    def close(self, a: Tensor, b: Tensor) -> Streams:
        """Behind the last of the steps that are open, with what comes out."""
        if self.recording is not None:
            self._close().hold(a, b)
        return a, b

    def close_joined(self, a: Tensor, b: Tensor) -> Tensor:
        """The same for a stack whose output is both streams: it is all that is held."""
        recording, y = self.recording, self.stack._join(a, b)
        if recording is None:
            return y
        tape, halves = self._close(), self.stack._halves
        large = a.nbytes >= alone.LARGE
        copy = type(recording.frames[-1].coupling) is not Additive  # else its inverse only reads the second stream
        tape.read = lambda output: halves(output[0][0], copy or (large and alone.is_alone(output[0][0])))
        tape.hold(y)
        if large:
            alone.part_gradient(y)
        return y

    def _close(self) -> Tape:
        assert self.recording is not None
        self.recording.close()
        if any(map(CALLS_AUTOGRAD, self.recording.frames)):
            self.stack.__dict__["_calls_autograd"] = True
        tape, self.recording = self.recording.tape, None
        self.drew |= tape.drew
        return tape


def _is_distributed() -> bool:
    """Then a block's parameters may be sharded, and there only while its backward runs."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _ignore(a: Tensor, b: Tensor) -> None: ...


def _pair(output: Output) -> Streams:
    (a, _), (b, _) = output
    return a, b


def dense_streams(a: Tensor, b: Tensor) -> Streams:
    return dense(a), dense(b)


def dense(stream: Tensor) -> Tensor:
    """Without gaps, in the same order of dimensions: as streams between blocks are, so that backward meets the same.

    Kernels, what they save and how they round, depend on how memory is laid out.
    """
    return stream.clone() if has_gaps(stream) else stream
