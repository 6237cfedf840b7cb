"""Stacks of reversible steps: one class says what is computed, the other how it is executed.

CoupledSequential       a, b = split(x); a, b = coupling(a, b, block(b)) block by block; join(a, b)
ReversibleSequential    the same function, holding its output only
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_eval_frame

from lightning_revlib.nn.coupling import Coupling, CouplingSpec, Invertible, Pair, Streams, get_coupling
from lightning_revlib.nn.drift import Sentinel
from lightning_revlib.nn.replay import version
from lightning_revlib.nn.tape import Tape

CouplingFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Call: TypeAlias = tuple[Sequence[Any], Mapping[str, Any]]


class Step:
    """A block with its coupling and the arguments of one call of the stack."""

    __slots__ = ("args", "coupling", "dtype", "key", "kwargs", "module", "stack")

    def __init__(
        self, stack: CoupledSequential, key: str, module: nn.Module, coupling: Coupling, dtype: torch.dtype, call: Call
    ) -> None:
        self.stack, self.key, self.module, self.coupling, self.dtype = stack, key, module, coupling, dtype
        self.args, self.kwargs = call

    @property
    def name(self) -> str:
        return f"{self.stack.path}.{self.key} ({type(self.module).__name__})"

    def branch(self, b: Tensor, compiler: Any = None) -> Any:
        """The block's output for stream b, compiled if `compiler` is given; None for an invertible step."""
        if type(self.coupling) is Invertible:
            return None
        x = b if b.dtype is self.dtype else b.to(self.dtype)
        if compiler is None:
            f = self.module(x, *self.args, **self.kwargs)
        else:
            engine = set_eval_frame(compiler)
            try:
                f = self.module(x, *self.args, **self.kwargs)
            finally:
                set_eval_frame(engine)
        return f - x if self.stack.residual and isinstance(f, Tensor) else f

    def check(self, b: Tensor, f: Any, count: int) -> None:
        """Raise where the block did what a coupling cannot undo; `count` is b's version before it."""
        if type(self.coupling) is Invertible:
            return
        if not isinstance(f, Tensor):
            raise TypeError(f"{self.name} returned {type(f).__name__}; a block returns one tensor")
        if _version(b) != count:
            raise RuntimeError(
                f"{self.name} changes its input in place, and with it the stream that the next block sees;"
                " use inplace=False in its first operation"
            )
        if f.shape != (shape := self.coupling.branch_shape(b.shape)):
            raise ValueError(
                f"{self.name} returned shape {list(f.shape)}; for a stream of shape {list(b.shape)} its coupling,"
                f" {self.coupling}, needs {list(shape)}. An invertible step such as SpaceToDepth may change shapes"
            )
        if f.dtype is not b.dtype and torch.promote_types(f.dtype, b.dtype) != b.dtype:
            raise TypeError(f"{self.name} returned {f.dtype} for a stream of {b.dtype}; set stream_dtype={f.dtype}")


def _version(stream: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() else version(stream)


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

    Raises:
        ValueError: for an empty stack, an unknown coupling, a pair that is incomplete; when called,
            for a size that cannot be halved or a block that changes its stream's shape.
    """

    OPTIONS = ("split_dim", "couplings", "stream_dtype", "residual")
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
    ) -> None:
        super().__init__(*blocks)  # type: ignore[arg-type]
        self.configure(
            split_dim=split_dim,
            coupling=coupling,
            coupling_forward=coupling_forward,
            coupling_inverse=coupling_inverse,
            stream_dtype=stream_dtype,
            residual=residual,
        )

    def configure(
        self,
        *,
        split_dim: int | None = 1,
        coupling: CouplingSpec | Sequence[CouplingSpec] = "additive",
        coupling_forward: CouplingFunction | Sequence[CouplingFunction] | None = None,
        coupling_inverse: CouplingFunction | Sequence[CouplingFunction] | None = None,
        stream_dtype: torch.dtype | None = None,
        residual: bool = False,
    ) -> None:
        """Check and set all options but the blocks; `swap` calls it on an existing container."""
        if len(self) == 0:
            raise ValueError(f"{type(self).__name__} got no blocks; pass at least one module")
        if split_dim is not None and (not isinstance(split_dim, int) or isinstance(split_dim, bool)):
            raise TypeError(f"split_dim={split_dim!r}: pass the dimension to halve as an int, or None")
        self.split_dim, self.stream_dtype, self.residual = split_dim, stream_dtype, residual
        self.couplings = _couplings(coupling, coupling_forward, coupling_inverse)

    def forward(  # type: ignore[override]
        self, x: Tensor, *args: Any, layerwise: Sequence[Call] | None = None, **kwargs: Any
    ) -> Tensor:
        """The stack's output, of x's shape and dtype unless an invertible step changes the shape.

        `args` and `kwargs` reach every block; `layerwise` holds one ``(args, kwargs)`` for each,
        which come after and above the common ones.
        """
        a, b = self._split(x)
        for step in self._steps(x.dtype, args, kwargs, layerwise):
            count = _version(b)
            f = step.branch(b)
            step.check(b, f, count)
            a, b = step.coupling.forward(a, b, f)
        return self._join(a, b).to(x.dtype)

    def inverse(self, y: Tensor, *args: Any, layerwise: Sequence[Call] | None = None, **kwargs: Any) -> Tensor:
        """The x for which ``stack(x, ...)`` is y, with the same extra arguments.

        Exact up to rounding in eval mode. In training mode dropout draws anew, and no inverse is
        exact. Raises ValueError with `split_dim=None`: one output does not tell two streams.
        """
        if self.split_dim is None:
            raise ValueError("inverse with split_dim=None: one output does not determine two streams; set a split_dim")
        a, b = self._split(y, "output")
        for step in reversed(self._steps(y.dtype, args, kwargs, layerwise)):
            a_out, b_out = a, b
            b = step.coupling.recover(a_out, b_out)
            a = step.coupling.inverse(a_out, b_out, b, step.branch(b))
        return self._join(a, b).to(y.dtype)

    def extra_repr(self) -> str:
        couplings = self.couplings[0] if len(self.couplings) == 1 else list(self.couplings)
        return f"split_dim={self.split_dim}, coupling={couplings}"

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        part = type(self).__new__(type(self))
        part.__dict__ = {**self.__dict__, "_modules": dict(list(self._modules.items())[index])}
        return part

    def _split(self, x: Tensor, what: str = "input") -> Streams:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"the {what} must be a floating-point tensor, not {getattr(x, 'dtype', type(x).__name__)}")
        half = x.dtype in (torch.bfloat16, torch.float16)
        x = x.to(self.stream_dtype or (torch.float32 if half else x.dtype))
        dim = self.split_dim
        if dim is None:
            return self.couplings[0].start(x)
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"split_dim={dim} is out of range for an {what} of shape {list(x.shape)}")
        if x.shape[dim] % 2:
            raise ValueError(
                f"split_dim={dim}: size {x.shape[dim]} of an {what} of shape {list(x.shape)} cannot be halved;"
                " pad it to an even size, take another dimension, or split_dim=None to run the input on both streams"
            )
        a, b = x.chunk(2, dim)
        return a, b

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        if self.split_dim is None:
            return self.couplings[(len(self) - 1) % len(self.couplings)].finish(a, b)
        return torch.cat((a, b), self.split_dim)

    def _steps(
        self, dtype: torch.dtype, args: Sequence[Any], kwargs: Mapping[str, Any], layerwise: Sequence[Call] | None
    ) -> list[Step]:
        if layerwise is not None and len(layerwise) != len(self):
            raise ValueError(
                f"layerwise has {len(layerwise)} entries; pass one (args, kwargs) for each of {len(self)} blocks"
            )
        steps, blocks = [], 0
        for index, (name, module) in enumerate(self._modules.items()):
            call: Call = (args, kwargs)
            if layerwise is not None:
                call = (*args, *layerwise[index][0]), {**kwargs, **layerwise[index][1]}
            coupling: Coupling
            if hasattr(type(module), "inverse") and not isinstance(module, CoupledSequential):
                coupling = Invertible(module)
            else:
                coupling, blocks = self.couplings[blocks % len(self.couplings)], blocks + 1
            steps.append(Step(self, name, module, coupling, dtype, call))
        return steps


class ReversibleSequential(CoupledSequential):
    """`CoupledSequential` in constant memory: it holds its output, and backward rebuilds the rest.

    >>> stack = ReversibleSequential(*[nn.Linear(32, 32) for _ in range(64)])
    >>> stack(torch.randn(4, 64)).sum().backward()

    Same arguments, same numbers, same state-dict keys, 4/3 of the FLOPs. Blocks are run a second
    time in backward, with the same random numbers, autocast and buffers; their forward hooks fire
    twice. Its output must not be changed in place. Prefer `torch.utils.checkpoint` where a block's
    output is much smaller than what its input needs, or where blocks change the shape.
    """

    _drift: Tensor | None = None
    _draws = True  # whether the last forward has drawn random numbers

    @property
    def drift(self) -> float | None:
        """Relative error of the input as the last backward rebuilt it; None before, or if it need not be rebuilt."""
        return None if self._drift is None else self._drift.item()

    @torch.compiler.disable(recursive=False)
    def forward(self, x: Tensor, *args: Any, layerwise: Sequence[Call] | None = None, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x, *args, layerwise=layerwise, **kwargs)
        compiler = set_eval_frame(None)  # the engine is not compiled; its blocks are
        try:
            a, b = self._split(x)
            tape = Tape(x.device.type, self._read, self._arrived(Sentinel(a, b)), compiler)
            a, b = tape.run(self._steps(x.dtype, args, kwargs, layerwise), a, b, self._draws)
            self._draws = tape.drew
            if self.split_dim is None:
                return self._join(*tape.fix(a, b)).to(x.dtype)
            return tape.fix(self._join(a, b))[0].to(x.dtype)
        finally:
            set_eval_frame(compiler)

    def _read(self, tensors: tuple[Tensor, ...]) -> Streams:
        a, b = tensors if self.split_dim is None else tensors[0].chunk(2, self.split_dim)
        return a, b

    def _arrived(self, sentinel: Sentinel) -> Callable[[Tensor, Tensor], None]:
        def arrived(a: Tensor, b: Tensor) -> None:
            self._drift = sentinel.measure(a, b)

        return arrived


def _couplings(
    coupling: CouplingSpec | Sequence[CouplingSpec],
    forward: CouplingFunction | Sequence[CouplingFunction] | None,
    inverse: CouplingFunction | Sequence[CouplingFunction] | None,
) -> tuple[Coupling, ...]:
    if forward is None and inverse is None:
        many = coupling if isinstance(coupling, Sequence) and not isinstance(coupling, str) else [coupling]
        if not many:
            raise ValueError(f"coupling={coupling!r} is empty; name at least one, such as 'additive'")
        return tuple(get_coupling(one) for one in many)
    if forward is None or inverse is None:
        given, missing = ("coupling_forward", "coupling_inverse")[:: 1 if inverse is None else -1]
        raise ValueError(f"{given} was given without {missing}: the engine needs both directions of your coupling")
    forwards = list(forward) if isinstance(forward, Sequence) else [forward]
    inverses = list(inverse) if isinstance(inverse, Sequence) else [inverse]
    if len(forwards) != len(inverses) or not forwards:
        raise ValueError(
            f"coupling_forward has {len(forwards)} entries and coupling_inverse {len(inverses)}; pass as many of each,"
            " and at least one"
        )
    return tuple(Pair(f, g) for f, g in zip(forwards, inverses, strict=True))
