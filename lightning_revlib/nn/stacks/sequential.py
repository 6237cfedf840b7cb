"""Stacks of reversible steps: one class says what is computed, the other how it is executed.

CoupledSequential       a, b = split(x); a, b = coupling(a, b, block(b)) block by block; join(a, b)
ReversibleSequential    the same function, holding its output only

A third of the file describes the options, in one place for both classes and for `swap`.
"""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import set_eval_frame

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.coupling.exact import grid_limit, round_to_grid
from lightning_revlib.nn.coupling.standard import CouplingSpec
from lightning_revlib.nn.plan.budget import Budget
from lightning_revlib.nn.stacks.build import build_steps, call_of, is_invertible
from lightning_revlib.nn.stacks.options import (
    CouplingFunction,
    MemoryBudget,
    OnDrift,
    Treatment,
    read_couplings,
    read_treatments,
)
from lightning_revlib.nn.stacks.reversible import Reversible
from lightning_revlib.nn.steps.branches import BranchSpec, check_branches
from lightning_revlib.nn.steps.chunks import check_chunks, read_chunks
from lightning_revlib.nn.steps.step import Call, Step
from lightning_revlib.nn.treatments.run import Execution, dense

EXTRA = operator.attrgetter("extra")


class CoupledSequential(nn.Sequential):
    """Blocks that act on two halves of their input in turn, differentiated by ordinary autograd.

    >>> stack = CoupledSequential(nn.Linear(8, 8), nn.Linear(8, 8), split_dim=1, coupling="additive")
    >>> stack(torch.randn(4, 16)).shape
    torch.Size([4, 16])

    `Trainer(strategy="reversible")`, `swap` and `ReversibleSequential` run the same function in
    constant memory. Children are named "0", "1", ... as in `nn.Sequential`.

    Args:
        *blocks: one or more modules; each maps a stream to a tensor of the stream's shape. A module
            with a method `inverse` (`SpaceToDepth`; not a stack) is an invertible step: it is
            applied to both streams.
        split_dim: the dimension along which the input is halved and the output joined. None: the
            coupling's `start` makes two streams of the input's shape and `finish` makes one of them.
        coupling: a name, a mapping such as ``{"name": "momentum", "gamma": 0.9}``, a `Coupling`, or
            a list of them, cycled over the blocks.
        coupling_forward: instead of `coupling`, ``(other, f) -> out``, or a list of such, cycled.
        coupling_inverse: ``(out, f) -> other``, which undoes `coupling_forward`.
        stream_dtype: the streams' dtype; default float32 for half-precision input, else the
            input's. Blocks and the output have the input's dtype in any case.
        residual: the blocks contain their skip connection: f(x) - x is their branch.
        branches: the parts of each residual branch of a block, to make each a step of its own, such as
            ``[["ln_1", "attn"], ["ln_2", "mlp"]]``; see `lightning_revlib.nn.steps.branches.Branch`.
        grid_bits: make the stack exact: streams are rounded to multiples of 2^-grid_bits and backward
            rebuilds them, and with them the gradients, to the last bit. Between 8 and 16 is usual;
            streams must stay below 2^(24 - grid_bits). For additive, midpoint, leapfrog and bdia.
        ordinary: so many of the first blocks are called as they are, before the streams begin, such as
            the block that changes the shape at the start of a residual network's stage.
        chunks: do each block on so many chunks of its input, one after the other, so that backward holds what one
            chunk has saved: for blocks whose output for a chunk depends on that chunk only. A list is
            cycled over the steps, such as [1, 4] for attention and feed-forward in turn.
        chunk_dim: the dimension that is cut: 0 for samples, 1 for the tokens of a feed-forward layer.
        store_last: so many of the last blocks keep their activations, which saves their second run.
        treatments: instead, for each block "reversible", "checkpoint" (keep the block's input, run it
            again), "selective" (keep its matrix products and convolutions, too, and run the rest
            again), "offload" (on CUDA, keep all in the host's memory) or "store".
        memory_budget: instead, the bytes that the stack's activations may take, at most and with its
            output and that one's gradient: an int, a text such as "2GiB", a fraction of what ordinary
            autograd takes, or "auto", what is free on the CUDA device. The first forward measures,
            and later ones follow the `plan` with the least work.
        offload: let the plan of a memory budget choose "offload", too, where copies are no longer than the
            device's work.
        overlap: on CUDA, undo the block before on a stream of its own while a block's backward runs: faster where
            kernels are small, and backward holds what two blocks save. Not with FSDP or ZeRO-3.
        context_fn: as in `torch.utils.checkpoint`: makes two contexts for each run again of a block,
            such as those of selective checkpointing.
        on_drift: what to do when backward's reconstruction of the input is off by more than
            `drift_tolerance`, relative: "warn" or "raise", which wait for the device in each backward; "warn_once",
            which looks in the first backward, the second, the fourth, the eighth and so on; or "ignore", which
            measures nothing, and need not run the first block to its end again.

    The last eight say how a reversible stack is executed; this class keeps them for the swap.

    Raises:
        ValueError: for an empty stack, an unknown coupling, a pair that is incomplete, a coupling that
            cannot be exact; when called, for a size that cannot be halved, a block that changes its
            stream's shape, a stream that leaves the grid.
    """

    OPTIONS = (
        "given", "split_dim", "couplings", "stream_dtype", "residual", "branches", "grid_bits", "ordinary",
        "chunks", "chunk_dim", "treatments", "budget", "offload", "overlap", "context_fn", "on_drift",
        "drift_tolerance",
    )  # fmt: skip
    _step: type[Step] = Step
    path = "stack"  # where the stack is in its model, for errors; `swap` sets it

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
        grid_bits: int | None = None,
        ordinary: int = 0,
        chunks: int | Sequence[int] = 1,
        chunk_dim: int = 0,
        store_last: int = 0,
        treatments: Sequence[Treatment] | None = None,
        memory_budget: MemoryBudget | None = None,
        offload: bool = False,
        overlap: bool = False,
        context_fn: Callable[[], tuple[Any, Any]] | None = None,
        on_drift: OnDrift = "warn_once",
        drift_tolerance: float = 1e-2,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "blocks", "__class__")}
        super().__init__(*blocks)  # type: ignore[arg-type]
        self.given = given  # the options as they were passed, for `swap` to change some of them
        if len(self) == 0:
            raise ValueError(f"{type(self).__name__} got no blocks; pass at least one module")
        if split_dim is not None and (not isinstance(split_dim, int) or isinstance(split_dim, bool)):
            raise TypeError(f"split_dim={split_dim!r}: pass the dimension to halve as an int, or None")
        if on_drift not in get_args(OnDrift):
            raise ValueError(f"on_drift={on_drift!r} is none of {', '.join(map(repr, get_args(OnDrift)))}")
        self.split_dim, self.stream_dtype, self.residual, self.grid_bits = split_dim, stream_dtype, residual, grid_bits
        if not isinstance(ordinary, int) or not 0 <= ordinary < len(self):
            raise ValueError(f"ordinary={ordinary!r}: of {len(self)} blocks, 0 to {len(self) - 1} can be ordinary ones")
        self.ordinary = ordinary
        self.branches = tuple(branches or ())
        children = list(self._modules.items())[ordinary:]
        coupled = {key: m for key, m in children if m is not None and not is_invertible(m)}
        if branches is not None:
            check_branches(coupled, branches, residual)
        self.couplings = read_couplings(coupling, coupling_forward, coupling_inverse)
        for name, value in (("offload", offload), ("overlap", overlap)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r}: pass True or False")
        if overlap and memory_budget is not None:
            raise ValueError(
                f"overlap=True holds what two blocks save, memory_budget={memory_budget!r} counts one: pass one of them"
            )
        self.offload, self.overlap = offload, overlap
        self.context_fn, self.on_drift, self.drift_tolerance = context_fn, on_drift, drift_tolerance
        self.treatments = read_treatments(treatments, store_last, len(self))
        if memory_budget is not None and (store_last or treatments):
            raise ValueError(
                f"memory_budget={memory_budget!r} chooses the treatments; leave out store_last and treatments"
            )
        self.budget = None if memory_budget is None else Budget(memory_budget)
        self.chunks, self.chunk_dim = read_chunks(chunks, chunk_dim), chunk_dim
        check_chunks(self.chunks, coupled, self.branches)
        self._set_grid()

    def forward(  # type: ignore[override]
        self, x: Tensor, *args: Any, layerwise: Sequence[Call] | None = None, **kwargs: Any
    ) -> Any:
        """The stack's output, of x's shape and dtype unless an invertible step changes the shape.

        `args` and `kwargs` reach every block; `layerwise` holds one ``(args, kwargs)`` for each,
        which come after and above the common ones. If a block returns more than its branch (a
        tuple, dict or dataclass that begins with it), the stack returns ``(output, extras)`` with the
        rest of each block's output, or None, in a list.
        """
        x = self._begin(x, args, kwargs, layerwise)
        a, b = self._split(x)
        steps = build_steps(self, x.dtype, args, kwargs, layerwise)
        for step in steps:
            a, b = step.run(a, b)
        return _with_extras(self._join(a, b).to(x.dtype), steps)

    def inverse(self, y: Tensor, *args: Any, layerwise: Sequence[Call] | None = None, **kwargs: Any) -> Tensor:
        """The x for which ``stack(x, ...)`` is y, with the same extra arguments.

        Exact up to rounding in eval mode. In training mode dropout draws anew, and no inverse is
        exact. Raises ValueError with `split_dim=None`: one output does not tell two streams.
        """
        if self.ordinary:
            raise ValueError("inverse with ordinary blocks: they have none; call it on stack[ordinary:]")
        if hopeless := [c for c in self.couplings if c.growth == math.inf]:
            raise ValueError(f"inverse with coupling {hopeless[0]}: it has none")
        if self.split_dim is None:
            raise ValueError("inverse with split_dim=None: one output does not determine two streams; set a split_dim")
        a, b = self._split(y, "output")
        for step in reversed(build_steps(self, y.dtype, args, kwargs, layerwise)):
            a, b = step.inverse(a, b)
        return self._join(a, b).to(y.dtype)

    def extra_repr(self) -> str:
        couplings = self.couplings[0] if len(self.couplings) == 1 else list(self.couplings)
        return f"split_dim={self.split_dim}, coupling={couplings}"

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        part = type(self).__new__(type(self))
        part.__dict__ = {**self.__dict__, "_modules": dict(list(self._modules.items())[index])}
        part.treatments = self.treatments[index]
        part.budget = None if self.budget is None else Budget(self.budget.value)
        part.ordinary = sum(i < self.ordinary for i in range(len(self))[index])
        return part

    def _split(self, x: Tensor, what: str = "input", *, copy: bool = True) -> Streams:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"the {what} must be a floating-point tensor, not {getattr(x, 'dtype', type(x).__name__)}")
        half = x.dtype in (torch.bfloat16, torch.float16)
        if half or self.stream_dtype is not None:
            x = x.to(self.stream_dtype or torch.float32)
        if self.grid_bits is not None:
            if x.is_nested:
                raise TypeError(
                    f"grid_bits={self.grid_bits}: {self.path} got a nested tensor, which torch cannot round; set"
                    " use_nested_tensor = False on your nn.TransformerEncoder"
                )
            grid_limit(x.dtype, self.grid_bits)
            x = round_to_grid(x, self.grid_bits)
        dim = self.split_dim
        if dim is None:
            return self.couplings[0].start(dense(x))
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"split_dim={dim} is out of range for an {what} of shape {list(x.shape)}")
        if x.shape[dim] % 2:
            raise ValueError(
                f"split_dim={dim}: size {x.shape[dim]} of an {what} of shape {list(x.shape)} cannot be halved;"
                " pad it to an even size, take another dimension, or split_dim=None to run the input on both streams"
            )
        return self._halves(x) if copy else x.chunk(2, dim)  # type: ignore[return-value]

    def _halves(self, x: Tensor, copy: bool = True) -> Streams:
        """Both dense, or the first, and the second a view."""
        assert self.split_dim is not None
        a, b = x.chunk(2, self.split_dim)
        return dense(a), dense(b) if copy else b

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        if self.split_dim is None:
            return self.couplings[
                ((len(self) - self.ordinary) * (len(self.branches) or 1) - 1) % len(self.couplings)
            ].finish(a, b)
        return torch.cat((a, b), self.split_dim)

    def _begin(
        self, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], layerwise: Sequence[Call] | None
    ) -> Tensor:
        for index in range(self.ordinary):
            first, named = call_of(index, args, kwargs, layerwise)
            x = self[index](x, *first, **named)
        return x

    def _set_grid(self) -> None:
        if self.grid_bits is None:
            if needy := [c for c in self.couplings if c.needs_grid]:
                name = type(needy[0]).__name__.lower()
                raise ValueError(f"coupling {name!r} works on the exact grid only; set grid_bits, such as grid_bits=12")
            return
        if not isinstance(self.grid_bits, int) or not 0 <= self.grid_bits < 24:
            raise ValueError(
                f"grid_bits={self.grid_bits!r}: the grid is 2^-grid_bits; take an int from 0 to 23, such as 12"
            )
        self.couplings = tuple(c.on_grid(self.grid_bits) for c in self.couplings)
        for name, module in self._modules.items():
            if is_invertible(module) and not getattr(module, "exact", False):
                raise ValueError(
                    f"grid_bits={self.grid_bits}: invertible step {name} ({type(module).__name__}) is not exact; steps"
                    " that only move numbers, and say so by an attribute `exact`, are"
                )


class ReversibleSequential(Reversible, CoupledSequential):
    """`CoupledSequential` in constant memory: it holds its output, and backward rebuilds the rest.

    >>> stack = ReversibleSequential(*[nn.Linear(32, 32) for _ in range(64)])
    >>> stack(torch.randn(4, 64)).sum().backward()

    Same arguments, same numbers, same state-dict keys, 4/3 of the FLOPs. Blocks are run a second
    time in backward, with the same random numbers, autocast and buffers; their forward hooks fire
    twice. Its output must not be changed in place. Prefer `torch.utils.checkpoint` where a block's
    output is much smaller than what its input needs, or where blocks change the shape.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, *args: Any, layerwise: Sequence[Call] | None = None, **kwargs: Any
    ) -> Any:
        if torch.compiler.is_exporting():
            return super().forward(x, *args, layerwise=layerwise, **kwargs)
        return self._forward(x, args, kwargs, layerwise)

    @torch.compiler.disable(recursive=False)
    def _forward(self, x: Tensor, args: Any, kwargs: Any, layerwise: Sequence[Call] | None) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(x, *args, layerwise=layerwise, **kwargs)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise RuntimeError(
                "torch.func transforms cannot run a reversible stack, since they allow no saved-tensor hooks;"
                " lightning_revlib.restore(model) makes it an ordinary one, with the same parameters"
            )
        if self.ordinary:
            x = self._begin(x, args, kwargs, layerwise)
        compiler = set_eval_frame(None)  # the engine is not compiled; its blocks are
        steps = build_steps(self, x.dtype, args, kwargs, layerwise)
        try:
            return self._run(x, steps, compiler)
        except BaseException:
            _forget(steps)
            raise
        finally:
            set_eval_frame(compiler)

    def _run(self, x: Tensor, steps: list[Step], compiler: Any) -> Any:
        views = self.grid_bits is None and self.split_dim is not None
        a, b = self._split(x, copy=not views)
        execution = Execution(self, compiler, len(steps))
        execution.views, execution.lent = views, x.is_leaf
        for step in steps:
            a, b = execution.step(step, a, b)
        if self.split_dim is None:
            y = self._join(*execution.close(a, b))
        else:
            y = execution.close_joined(a, b)
        execution.end(y)
        self.__dict__["_draws"] = execution.drew
        return _with_extras(y if y.dtype is x.dtype else y.to(x.dtype), steps)


def _with_extras(y: Tensor, steps: list[Step]) -> Any:
    extras = list(map(EXTRA, steps))
    if all(map(operator.is_, extras, repeat(None))):
        return y
    _forget(steps)
    return y, extras


def _forget(steps: list[Step]) -> None:
    for step in steps:
        step.extra = None  # it refers to the graph, which refers to the step
