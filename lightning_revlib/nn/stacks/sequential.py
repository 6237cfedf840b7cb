"""Stacks of reversible steps: one class says what is computed, the other how it is executed.

CoupledSequential       a, b = split(x); a, b = coupling(a, b, block(b)) block by block; join(a, b)
ReversibleSequential    the same function, holding its output only

A third of the file describes the options, in one place for both classes and for `swap`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_revlib.nn.compilation import compiled_by
from lightning_revlib.nn.coupling.registry import CouplingFunction, CouplingSpec
from lightning_revlib.nn.engine.saved_tensors import ContextFunction
from lightning_revlib.nn.internals import in_transform, is_exporting
from lightning_revlib.nn.plan.limit import MemoryBudget
from lightning_revlib.nn.stacks.build import arguments_of_blocks, build_steps
from lightning_revlib.nn.stacks.options import OnDrift, StackOptions, options_of_slice
from lightning_revlib.nn.stacks.reversible import Reversible, run_eagerly
from lightning_revlib.nn.stacks.stack import Stack
from lightning_revlib.nn.steps.branches import BranchSpec
from lightning_revlib.nn.steps.step import Arguments, Step


class CoupledSequential(Stack, nn.Sequential):
    """A stack of blocks that act on the two halves of the input in turn, differentiated by ordinary autograd.

    >>> stack = CoupledSequential(nn.Linear(8, 8), nn.Linear(8, 8), split_dim=1, coupling="additive")
    >>> stack(torch.randn(4, 16)).shape
    torch.Size([4, 16])

    `Trainer(strategy="reversible")`, `swap` and `ReversibleSequential` run the same function in
    activation memory that does not grow with depth. Children are named "0", "1", ... as in `nn.Sequential`.

    Args:
        *blocks: one or more modules; each maps a stream to a tensor of the stream's shape. A module
            with a method `inverse` (`SpaceToDepth`; not a stack) is an invertible step: it is
            applied to both streams, without further arguments.
        split_dim: the dimension along which the input is halved and the output joined. None: the
            coupling's `start` makes two streams of the input's shape and `finish` makes one of them.
        coupling: a name, a mapping such as ``{"name": "momentum", "gamma": 0.9}``, a `Coupling`, or
            a list of them, cycled over the blocks.
        coupling_forward: instead of `coupling`, a function ``(other, f) -> out`` of the other stream and the block's
            output f, or a list of such functions, cycled.
        coupling_inverse: ``(out, f) -> other``, which undoes `coupling_forward`.
        stream_dtype: the streams' dtype; default float32 for half-precision input, else the
            input's. Blocks and the output have the input's dtype in any case.
        residual: True if the blocks contain their skip connection; f(x) - x then joins the streams.
        branches: the parts of each residual branch of a block, to make each branch a separate step, such as
            ``[["ln_1", "attn"], ["ln_2", "mlp"]]``; see `lightning_revlib.nn.steps.branches.Branch`.
        grid_bits: make the stack exact: streams are rounded to multiples of 2^-grid_bits and backward
            rebuilds them, and with them the gradients, to the last bit. Between 8 and 16 is usual;
            streams must stay below 2^(24 - grid_bits). "auto": the first forward does not round, is checkpointed, and
            chooses the finest grid with room for four times its largest value. For additive, midpoint, leapfrog, bdia,
            and momentum and scaled with a power of two.
        ordinary: the number of first blocks to call as plain modules, before the input is split, such as the block
            that changes the shape at the start of a residual network's stage.
        chunks: the number of chunks of its input on which each block runs, one after the other, so that backward
            holds what one chunk has saved: for blocks whose output for a chunk depends on that chunk only. A list is
            cycled over the steps, such as [1, 4] for attention and feed-forward in turn.
        chunk_dim: the dimension that is cut: 0 for samples, 1 for the tokens of a feed-forward layer.
        store_last: the number of last blocks that keep their activations, which saves their second run.
        treatments: instead of `store_last`, for each block "reversible", "checkpoint" (keep the block's input, run
            the block again), "selective" (also keep its matrix products and convolutions, and run the rest again),
            "offload" (on CUDA, keep all in the host's memory) or "store".
        memory_budget: instead of both, the most bytes that the stack's activations may take, with its output and
            the output's gradient: an int, a text such as "2GiB", a float as a fraction of what ordinary autograd
            takes, or "auto", nine tenths of the CUDA device's free memory. The first forward measures, and later
            ones follow the `plan` with the least work.
        offload: let the plan of a memory budget choose "offload", too, if copies take no longer than the device's
            work.
        overlap: on CUDA, recompute the previous block on a second stream while a block's backward runs: faster if
            kernels are small, and backward holds what two blocks save. Not with FSDP or ZeRO-3.
        context_fn: as in `torch.utils.checkpoint`: returns two contexts, for the first and the second run of a
            block, such as those of selective checkpointing.
        on_drift: what to do if the relative error of the rebuilt input is above `drift_tolerance`: "warn" or
            "raise", which wait for the device in each backward; "warn_once", which checks the first backward, the
            second, the fourth, the eighth and so on; or "ignore", which measures nothing.
        drift_tolerance: see `on_drift`.

    The options from `store_last` on say how a reversible stack is executed; this class keeps them for the swap.

    Raises:
        ValueError: for an empty stack, an unknown coupling, a pair that is incomplete, a coupling that
            cannot be exact; when called, for a size that cannot be halved, a block that changes its
            stream's shape, a stream that leaves the grid.
    """

    def __init__(
        self,
        *blocks: nn.Module | OrderedDict[str, nn.Module],
        split_dim: int | None = 1,
        coupling: CouplingSpec | Sequence[CouplingSpec] = "additive",
        coupling_forward: CouplingFunction | Sequence[CouplingFunction] | None = None,
        coupling_inverse: CouplingFunction | Sequence[CouplingFunction] | None = None,
        stream_dtype: torch.dtype | None = None,
        residual: bool = False,
        branches: Sequence[BranchSpec] | None = None,
        grid_bits: int | Literal["auto"] | None = None,
        ordinary: int = 0,
        chunks: int | Sequence[int] = 1,
        chunk_dim: int = 0,
        store_last: int = 0,
        treatments: Sequence[str] | None = None,
        memory_budget: MemoryBudget | None = None,
        offload: bool = False,
        overlap: bool = False,
        context_fn: ContextFunction | None = None,
        on_drift: OnDrift = "warn_once",
        drift_tolerance: float = 1e-2,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "blocks", "__class__")}
        super().__init__(*blocks)  # type: ignore[arg-type]
        if len(self) == 0:
            raise ValueError(f"{type(self).__name__} got no blocks; pass at least one module")
        self.set_options(StackOptions(**given))

    def forward(  # type: ignore[override]
        self, x: Tensor, *args: Any, layerwise: Sequence[Arguments] | None = None, **kwargs: Any
    ) -> Any:
        """Return the stack's output, of x's shape and dtype unless an invertible step changes the shape.

        `args` and `kwargs` reach every block. `layerwise` holds one ``(args, kwargs)`` for each block; its args come
        after the common ones, and its kwargs replace common ones of the same name. If a block returns more than its
        branch (a tuple, dict or dataclass that begins with it), the stack returns ``(output, extras)`` with the rest of
        each block's output, or None, in a list.
        """
        arguments = arguments_of_blocks(self, args, kwargs, layerwise)
        x = self._run_ordinary(x, arguments)
        a, b = self.split(x)
        steps = build_steps(self, x.dtype, arguments)
        for step in steps:
            a, b = step.run(a, b)
        return _with_extras(self.join(a, b).to(x.dtype), steps)

    def inverse(self, y: Tensor, *args: Any, layerwise: Sequence[Arguments] | None = None, **kwargs: Any) -> Tensor:
        """Return the x for which ``stack(x, ...)`` is y, with the same extra arguments.

        Exact up to rounding in eval mode. In training mode dropout draws anew, and no inverse is exact. With
        gradients all blocks' activations are stored; further outputs of blocks are dropped. Raises ValueError
        with `split_dim=None`: one output does not determine two streams.
        """
        if self.options.ordinary:
            raise ValueError("inverse with ordinary blocks: they have none; call it on stack[ordinary:]")
        if hopeless := [c for c in self.couplings if c.growth == math.inf]:
            raise ValueError(f"inverse with coupling {hopeless[0]}: it has none")
        if self.options.split_dim is None:
            raise ValueError("inverse with split_dim=None: one output does not determine two streams; set a split_dim")
        a, b = self.split(y, "output")
        for step in reversed(build_steps(self, y.dtype, arguments_of_blocks(self, args, kwargs, layerwise))):
            a, b = step.inverse(a, b)
        return self.join(a, b).to(y.dtype)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        part = type(self).__new__(type(self))
        kept = {"_parameters": {**self._parameters}, "_buffers": {**self._buffers}, "training": self.training}
        part.__dict__ = {**self.__dict__, **vars(nn.Module()), **kept}
        part._modules = dict(list(self._modules.items())[index])
        part.__dict__.pop("_history", None)
        part.options, part.resolved = options_of_slice(self.options, self.resolved, list(self), index)
        return part

    def __add__(self, other: Any) -> Any:
        """Return a stack of the blocks of both, with the options of this one."""
        return self._of(super().__add__(other), alike=not isinstance(other, Stack) or other.options == self.options)

    def __mul__(self, other: int) -> Any:
        """Return a stack of the blocks so many times, with their weights shared."""
        return self._of(super().__mul__(other))

    def _of(self, blocks: nn.Sequential, alike: bool = True) -> Any:
        """Return a stack of other blocks, with these options. Raises ValueError if they are not alike for all."""
        if not alike or self.options.ordinary or len(set(self.treatments)) > 1:
            raise ValueError(
                f"{self.path}: the sum or multiple of stacks with other options, ordinary blocks or treatments of their"
                " own; make one stack of all blocks, with the options wanted"
            )
        stack = self[:]
        stack._modules = blocks._modules
        return stack

    def _run_ordinary(self, x: Tensor, arguments: Sequence[Arguments]) -> Tensor:
        for block, (args, kwargs) in zip(list(self)[: self.options.ordinary], arguments, strict=False):
            x = block(x, *args, **kwargs)
        return x


class ReversibleSequential(Reversible, CoupledSequential):
    """`CoupledSequential` that holds its output only; backward rebuilds the rest.

    >>> stack = ReversibleSequential(*[nn.Linear(32, 32) for _ in range(64)])
    >>> stack(torch.randn(4, 64)).sum().backward()

    It has the same arguments, results and state-dict keys, and takes 4/3 of the FLOPs. Blocks run a second time in
    backward, with the same random numbers, autocast and buffers; their forward hooks are called twice. Do not change
    the output in place before backward. Prefer `torch.utils.checkpoint` for few blocks, or for blocks that change the
    shape.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, *args: Any, layerwise: Sequence[Arguments] | None = None, **kwargs: Any
    ) -> Any:
        if is_exporting():
            return super().forward(x, *args, layerwise=layerwise, **kwargs)
        return self._forward(x, args, kwargs, layerwise)

    @run_eagerly
    def _forward(self, x: Tensor, args: Any, kwargs: Any, layerwise: Sequence[Arguments] | None) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(x, *args, layerwise=layerwise, **kwargs)
        if in_transform():
            raise RuntimeError(
                "torch.func transforms cannot run a reversible stack, since they allow no saved-tensor hooks;"
                " lightning_revlib.restore(model) makes it an ordinary one, with the same parameters"
            )
        arguments = arguments_of_blocks(self, args, kwargs, layerwise)
        x = self._run_ordinary(x, arguments)
        steps: list[Step] = []
        try:
            with compiled_by(None) as compiler:  # the engine is not compiled; its blocks are
                streams = [*self.split(x, views=True)]
                steps = build_steps(self, x.dtype, arguments)
                y = self._run(streams, steps, compiler)
                return _with_extras(y if y.dtype is x.dtype else y.to(x.dtype), steps)
        finally:
            for step in steps:
                step.take_extra()

    def _run(self, streams: list[Tensor], steps: Sequence[Step], compiler: Any) -> Tensor:
        b, a = streams.pop(), streams.pop()  # nothing else is to hold them
        run = self.new_run(list(dict.fromkeys(step.module for step in steps)), compiler)
        for step in steps:
            a, b = run.step(step, a, b)
        return self.end_run(run, a, b)


def _with_extras(y: Tensor, steps: Sequence[Step]) -> Any:
    """Return the output, with what the blocks returned besides, if any did."""
    extras = [step.take_extra() for step in steps]
    return y if all(extra is None for extra in extras) else (y, extras)
