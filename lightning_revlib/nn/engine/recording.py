"""The forward of a tape's steps: each runs once, and leaves a frame and numbers for what autograd wants to save."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, clear_autocast_cache, nn

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.engine.frame import Frame
from lightning_revlib.nn.engine.norm_outputs import Norms
from lightning_revlib.nn.engine.saved_tensors import CallsAutograd, cannot_run_again, catch, release
from lightning_revlib.nn.state.buffers import BUFFERS, Buffers
from lightning_revlib.nn.state.norm_statistics import NormBefore, take_norms
from lightning_revlib.nn.state.parameters import Settings, parts, version
from lightning_revlib.nn.state.rng import Environment, RandomState

if TYPE_CHECKING:
    from lightning_revlib.nn.engine.tape import Tape
    from lightning_revlib.nn.steps.chunks import Chunk
    from lightning_revlib.nn.steps.step import Step


class Recording:
    """One forward onto a tape, step by step, for a stack whose steps may be called by others.

    If steps are expected to draw random numbers, the generators are looked at after each; else at the end only: if they
    have drawn unexpectedly, the entrance is kept this once, for backward to find out where. Between the layers of a
    list its model's code runs: what that changes, generators or autocast, a layer meets again. What autograd wants to
    save is let go at once, unless blocks need it, as they call autograd themselves. The frames live here until `close`,
    as the tape must not refer to them.
    """

    def __init__(self, tape: Tape, stack: Any, a: Tensor, b: Tensor, *, recasts: bool) -> None:
        self.tape, self.stack, self.exact, self.listed = tape, stack, stack.grid_bits is not None, stack.listed
        self.expect_draws = stack._draws or stack.listed
        self.start = self.random = RandomState(a)
        self.entrance = a.detach(), b.detach()
        self.frames: list[Frame] = []
        self.keeps_all, self.counts = stack._calls_autograd is not False, stack._counts is not False
        tape.environment = Environment(a)
        self.recasts = recasts and (tape.environment.casts or stack.listed)  # a block's own autocast clears its cache
        self.settings = Settings(*stack)
        self.buffered: dict[nn.Module, list[nn.Module]] = {}  # of each block, those that may change buffers or numbers
        self.norms_before: dict[nn.Module, list[NormBefore]] = {}  # those that need not be looked at in each step
        if self.counts or self.settings.has_buffers:
            self.buffered = {m: parts(m) if self.counts else list(filter(BUFFERS, parts(m))) for m in stack}
            if not (self.counts or self.listed) and len(self.buffered) == len(stack):
                self.norms_before = take_norms(self.buffered)
        self.arguments: dict[int, Tensor] = {}  # of all steps, by identity
        self.large_norms = Norms.matter(self.settings.modules, a)

    def step(self, step: Step, a: Tensor, b: Tensor, chunk: Chunk | None = None) -> Streams:
        # Few calls: between two blocks the processor has forgotten each function of Python's, which costs microseconds.
        tape, frames = self.tape, self.frames
        frame = Frame(step, b)
        frame.tape, frame.index, frame.stride, frame.a_needs_grad = tape, len(frames), b.stride(), a.requires_grad
        frame.above = frame.below = frame.environment = frame.norms = None
        frame.chunk, frame.keeps_all, count = chunk, self.keeps_all, b._version
        if frames:
            frames[-1].above = frame
            if tape.at_once or tape.ahead is not None:
                frame.below = weakref.ref(frames[-1])
        frames.append(frame)
        if self.buffered and (modules := self.buffered.get(step.module)):
            frame.buffers = Buffers(modules, numbers=self.counts)
        if self.listed:
            self._begin(frame, a)
            frame.settings = Settings(step.module)
        arguments = [(t, version(t)) for t in step.tensors()] if step.args or step.kwargs else []
        catch(frame._pack, frame._unpack)
        try:
            if tape.context_fn is None:
                f, step.extra = step.branch(b, tape.compiler)
            else:
                first, frame.again = tape.context_fn()
                with first:
                    f, step.extra = step.branch(b, tape.compiler)
            usual = type(f) is Tensor and not f.is_nested and f.shape == b.shape and f.dtype is b.dtype
            if not usual or b._version != count or step.coupling.other_shape:
                step.check(b, f, count)
            frame.saved_by_block = len(frame.saved)
            frame.coupling = coupling = step.bind(a, b) if step.coupling.binds else step.coupling
            streams = coupling.forward(a, b, f)
        except CallsAutograd as call:
            if call.args[0] is not frame:  # but a step round this stack's
                raise
            streams = None
        finally:
            release()
            frame.end()
        if streams is None:
            self._take_back(a)
            return self.step(step, a, b, chunk)
        a, b = streams
        if self.exact:
            step.check_grid(b)
        if arguments:
            step.check_arguments(arguments)
            self.arguments.update((id(t), t) for t, _ in arguments)
        if frame.settings is not None:
            frame.settings.close([t for t, _ in arguments])
        if frame.buffers:
            frame.close_buffers()
        if self.expect_draws and not (now := RandomState(a)).same(self.random):
            frame.random, self.random, tape.drew = self.random, now, True
        if self.recasts:
            clear_autocast_cache()
        return a, b

    def _begin(self, frame: Frame, a: Tensor) -> None:
        """Behind a model's own code: note what the layer meets."""
        self.random, frame.records = RandomState(a), torch.is_grad_enabled()
        if (environment := Environment(a)).then != self.tape.environment.then:
            frame.environment, self.tape.varied = environment, True

    def _take_back(self, a: Tensor) -> None:
        """The last step has to be run again, keeping what is saved."""
        frame, self.keeps_all = self.frames.pop(), True
        if self.expect_draws:
            self.random.set()
        frame.close_buffers()
        self._close_norms(frame)
        if (frame.buffers and frame.buffers.any()) or not (self.expect_draws or RandomState(a).same(self.start)):
            self.stack.__dict__["_calls_autograd"] = True
            raise cannot_run_again(frame.step) from None

    def _close_norms(self, frame: Frame) -> None:
        if met := self.norms_before.get(frame.step.module):
            frame.buffers = frame.buffers or Buffers()
            frame.buffers.close_norms(met)

    def close(self) -> None:
        self.tape.depth = len(self.frames)
        if self.norms_before:
            for frame in self.frames:
                self._close_norms(frame)
        if not self.listed:
            self.settings.close(list(self.arguments.values()))
            self.tape.settings = self.settings
        if self.large_norms:  # they matter where a step saves most; a plan counts on them in all
            planned = self.frames[0].step.stack.budget is not None
            most = 0 if planned else max(sum(frame.saved) for frame in self.frames)
            self.tape.norms_from = most - self.entrance[0].nbytes
        if not self.expect_draws and not RandomState(self.entrance[0]).same(self.start):
            self.tape.drew, self.tape.surprise = True, (self.frames[0], self.start, self.entrance)
