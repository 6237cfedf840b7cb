"""What autograd saves in one call of a step's block: it is handed numbers, and a second run finds the tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, clear_autocast_cache, nn
from torch._dynamo.eval_frame import skip_code

from lightning_revlib.nn.state.parameters import VERSION, Settings, parts

if TYPE_CHECKING:
    from lightning_revlib.nn.state.buffers import Buffers
    from lightning_revlib.nn.state.rng import RandomState
    from lightning_revlib.nn.steps.step import Step

# What `saved_tensors_hooks` and `torch.enable_grad` do, without an object and calls for each: six microseconds a step.
catch = torch._C._autograd._push_saved_tensors_default_hooks
release = torch._C._autograd._pop_saved_tensors_default_hooks
set_grad_enabled = torch._C._set_grad_enabled


class CallsAutograd(BaseException):
    """A call's block does so in its forward, and what it needs has been let go. Not for blocks to catch."""


class Enough(BaseException):
    """A second run has come to the last tensor that backward needs of it. Not for blocks to catch."""


class Saved(ABC):
    """One call of a step's block. `catch(call._pack, call._unpack)` before it, `call.end()` behind it."""

    __slots__ = (
        "__weakref__", "again", "b_needs_grad", "buffers", "calls_autograd", "caught", "changed", "keep", "keeps_all",
        "kept", "random", "records", "saved", "settings", "step", "versions",
    )  # fmt: skip

    def __init__(self, step: Step, b: Tensor) -> None:
        self.step, self.b_needs_grad = step, b.requires_grad
        self.saved: list[int] = []  # the bytes of each tensor that autograd wanted to save
        self.versions: list[int] = []  # their versions at that time
        self.kept: list[Tensor] | None = []  # all until the call ends, or those that have been changed before
        self.settings: Settings | None = None  # when the call has ended
        self.random: RandomState | None = None  # set if the block draws
        self.buffers: Buffers | None = None  # set if it meets any
        self.again: Any = None  # the second run's context
        self.calls_autograd = False  # the block does, itself
        self.keeps_all = True  # that it saves, until it ends, for such blocks; else what is fresh is let go at once
        self.records = True  # forward ran in grad mode, where autograd saves
        self.keep = False  # what is caught is not given away
        self.changed: dict[int, torch.Size] | None = None  # shapes of what was modified later, perhaps in vain
        self.caught: list[Tensor | None] | None = None  # what the second run has saved, each until it is asked for

    @abstractmethod
    def rewind(self) -> None:
        """Run the block a second time, and have caught what it saves. Raises RuntimeError if that is not possible."""

    def lend(self, b: Tensor, changed: Settings | None) -> list[Callable[[], Any]]:
        """Have the block meet what it met in forward, settings that have `changed`, too; returns what undoes that."""
        undo = [self.buffers.lend()] if self.buffers else []  # it may raise
        if changed:
            undo += changed.lend(parts(self.step.module))
        if self.random:
            undo.append(self.random.lend(b))
        return undo

    def run_again(self, b: Tensor, compiler: Any, pack: Any, unpack: Any) -> tuple[Any, Any]:
        """The block's second run, in grad mode as the first, of which `pack` gets what autograd saves."""
        grad = torch.is_grad_enabled()
        catch(pack, unpack)
        set_grad_enabled(self.records)
        try:
            if self.again is None:
                return self.step.branch(b, compiler)
            with self.again:
                return self.step.branch(b, compiler)
        finally:
            set_grad_enabled(grad)
            release()
            clear_autocast_cache()  # backward may be called within autocast, which would keep what was cast

    def run_short(self, b: Tensor, compiler: Any, caught: list[Tensor], modules: Sequence[nn.Module]) -> None:
        """The same, up to the last tensor that backward needs of it; these are the block's modules."""
        flags = list(map(attrgetter("training"), modules))
        try:
            self.run_again(b, compiler, partial(collect, caught, len(self.saved)), caught.__getitem__)
        except (Enough, Exception):  # compiled code may raise another for it
            if len(caught) < len(self.saved):
                raise
            for m, training in zip(modules, flags, strict=True):  # it may have been on its way, with others for a while
                if m.training != training:
                    m.training = training

    def _pack(self, tensor: Tensor) -> int:
        self.saved.append(tensor.nbytes)
        self.versions.append(version := tensor._version)
        if version or self.keeps_all:
            self.kept.append(tensor)  # type: ignore[union-attr]
        return len(self.saved) - 1

    def end(self) -> None:
        """Look whether what is kept has been changed. What was fresh: in the second run."""
        kept: Any = self.kept
        self.kept = None
        if not kept:
            return
        if sum(map(VERSION, kept)) != sum(self.versions):  # they only grow, and those of the others are 0
            numbers = [n for n, version in enumerate(self.versions) if version or self.keeps_all]
            self.changed = {n: t.shape for n, t in zip(numbers, kept, strict=True) if t._version != self.versions[n]}

    def close_buffers(self) -> None:
        """Behind the call: keep what is to be lent to the second run, if there is any."""
        if self.buffers is None:
            return
        if not self.buffers.close():
            self.buffers = None
        elif self.buffers.counts:
            self.step.stack.__dict__["_counts"] = True

    def _unpack(self, number: int) -> Tensor:
        caught = self.caught
        if caught is None or (tensor := caught[number]) is None:
            return self._find(number)
        # It is looked at here, as it comes into the processor's caches, and not with the others before.
        if tensor.nbytes != self.saved[number] or tensor._version != self.versions[number]:
            self._check(number, tensor)
        if not self.keep:
            caught[number] = None
        return tensor

    def _find(self, number: int) -> Tensor:
        """What autograd asks for where nothing is caught, or no more."""
        if self.kept is not None:
            if not self.keeps_all:
                raise CallsAutograd(self)
            self.calls_autograd = True
            return self.kept[number]
        self.check_unchanged(number)
        self.rewind()
        return self._unpack(number)

    def check_unchanged(self, number: int) -> None:
        """Raise RuntimeError where autograd asks for a tensor that is not what it was when it was saved."""
        if self.changed is not None and number in self.changed:
            raise RuntimeError(
                f"{self.step.name}: a tensor of shape {list(self.changed[number])} needed for its gradient has been"
                " modified by an inplace operation inside the block; use the operation that is not in-place"
            )

    def _check(self, number: int, tensor: Tensor) -> None:
        """Raise RuntimeError if it is not what the first run has saved."""
        if tensor.nbytes != self.saved[number]:
            self._complain([*self.caught])  # type: ignore[misc]
        if not self.versions[number]:  # what was fresh is not any more
            self.changed = {**(self.changed or {}), number: tensor.shape}
            self.check_unchanged(number)

    def give(self, tensors: list[Any]) -> None:
        """Have these, which the second run has saved, at hand for autograd."""
        if len(tensors) != len(self.saved):
            self._complain(tensors)
        for n in self.changed or ():
            tensors[n] = None
        self.caught = tensors

    def _complain(self, again: list[Tensor | None]) -> None:
        pairs = [(i, x, t) for i, (x, t) in enumerate(zip(self.saved, again)) if t is not None]  # noqa: B905
        lines = [
            f"{self.step.name} computes something else in backward than it did in forward: it saved"
            f" {len(self.saved)} tensors for its gradient, and {len(again)} when recomputed.",
            *[f"  {i}: saved {x:,} bytes, recomputed {_show(t)}" for i, x, t in pairs if x != t.nbytes][:3],
            "A block must depend on its input, arguments, parameters, registered buffers and torch's generators only.",
        ]
        if any(isinstance(m, torch.jit.ScriptModule) for m in parts(self.step.module)):
            lines.append("A scripted block is compiled after its first call with gradients; make one, as block(x).")
        raise RuntimeError("\n".join(lines))


def cannot_run_again(step: Step) -> RuntimeError:
    """For a block that has called autograd and changed more than can be taken back."""
    return RuntimeError(
        f"{step.name} calls autograd in its forward, as no block of this stack has done before, and has changed buffers"
        " or drawn random numbers meanwhile; call the stack again, it is prepared for it now"
    )


def _show(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}, {tensor.nbytes:,}"


def collect(tensors: list[Tensor], enough: int, tensor: Tensor) -> int:
    """Add a tensor to the others, up to `enough`, and return its number; -1: without end."""
    if len(tensors) != enough:
        tensors.append(tensor)
    if len(tensors) == enough:
        raise Enough
    return len(tensors) - 1


# Autograd calls these while a compiled block runs: they are not to be compiled themselves.
for function in (Saved._pack, Saved._unpack, collect):
    skip_code(function.__code__)
