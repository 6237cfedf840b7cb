"""One step of one forward: a block, its coupling and its arguments.

f = block(b, *args, **kwargs);  a, b = coupling.forward(a, b, f)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_revlib.nn.compilation import compiled_by
from lightning_revlib.nn.coupling.base import Coupling, Streams
from lightning_revlib.nn.coupling.invertible import Invertible
from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.state.base import NOTHING
from lightning_revlib.nn.state.tensors import is_fake, without_graphs
from lightning_revlib.nn.steps.outputs import split_output

Arguments: TypeAlias = tuple[Sequence[Any], Mapping[str, Any]]
RunBranch: TypeAlias = Callable[[Tensor, Any], tuple[Any, Any]]


@dataclass(slots=True)
class Step:
    """What a stack runs, and what backward runs again.

    `call` is called with a stream of `dtype`; it is the block `module`, or a branch of it. With `residual` it contains
    its skip connection: call(x) - x is its branch then. `split` parts what it returns into the branch and an `extra`.
    """

    path: str  # of the stack
    key: str  # of the block in it, and of the branch
    module: nn.Module
    coupling: Coupling
    call: Callable[..., Any]
    dtype: torch.dtype
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    residual: bool = False
    training: bool = False
    split: Callable[[Any], tuple[Any, Any]] = split_output
    watch: Callable[[Tensor, Tensor], None] | None = None  # gets the streams after the step
    extra: Any = None

    @property
    def name(self) -> str:
        return f"{self.path}.{self.key} ({type(self.module).__name__})"

    def run(self, a: Tensor, b: Tensor, compiler: Any = None, branch: RunBranch | None = None) -> Streams:
        """Run the step by ordinary autograd, and return the streams after it; `branch` may replace the method."""
        _, streams = self.couple(a, b, self.evaluate(b, compiler, branch))
        return streams

    def each(self, a: Tensor, b: Tensor, run: Callable[[Tensor, Tensor, Any], Streams]) -> Streams:
        """Return `run(a, b, chunk)`: in a step by chunks, joined from its chunks; else chunk is None."""
        return run(a, b, None)

    def evaluate(self, b: Tensor, compiler: Any = None, branch: RunBranch | None = None) -> Any:
        """Run the block on stream b the first time, and return its branch; what it returns besides is `extra`.

        Raises TypeError, ValueError or RuntimeError if the block does what no coupling can undo. A RuntimeError of the
        block's gets its path.
        """
        count = None if torch.compiler.is_compiling() or b.is_inference() else b._version
        try:
            f, self.extra = (branch or self.branch)(b, compiler)
        except RuntimeError as error:
            if "support saved tensor hooks" not in str(error):
                if type(error) is not RuntimeError or b.is_nested:  # no running out of memory, for one
                    raise
                raise RuntimeError(f"{self.name}, called with a stream of shape {list(b.shape)}: {error}") from error
            raise RuntimeError(
                f"{self.name} calls torch.func.grad, vjp, jacrev or hessian, which allow no saved-tensor hooks; give it"
                " treatment 'store', or have it call torch.autograd.grad with create_graph=True"
            ) from error
        self.check(b, f)
        if count is not None and b._version != count:
            raise RuntimeError(
                f"{self.name} changes its input in place, and with it the stream that the next block sees;"
                " use inplace=False in its first operation"
            )
        return f

    def branch(self, b: Tensor, compiler: Any = None) -> tuple[Any, Any]:
        """Return the block's branch for stream b, and what it returns besides; (None, None) for an invertible step.

        `compiler` compiles the block: it is torch.compile's callback, or None.
        """
        if isinstance(self.coupling, Invertible):
            return None, None
        x = b if b.dtype is self.dtype else b.to(self.dtype)
        with NOTHING if compiler is None else compiled_by(compiler):
            out = self.call(x, *self.args, **self.kwargs)
        f, extra = (out, None) if isinstance(out, Tensor) else self.split(out)
        if self.residual and isinstance(f, Tensor) and (f.is_nested or f.shape == x.shape):
            f = f - x
        return f, extra

    def couple(self, a: Tensor, b: Tensor, f: Any) -> tuple[Coupling, Streams]:
        """Return the coupling as it is in this call, and the streams after the step."""
        coupling = self.coupling.bind(a, b, self.training)
        streams = coupling.forward(a, b, f)
        if self.watch is not None:
            self.watch(*streams)
        if self.coupling.bits is not None:
            check_on_grid(streams[1], self.coupling, self.coupling.bits, f"{self.name}: the stream")
        return coupling, streams

    def inverse(self, a_out: Tensor, b_out: Tensor) -> Streams:
        """Return the streams before the step, given those after it."""
        b = self.coupling.recover(a_out, b_out)
        f, _ = self.branch(b)
        self.check(b, f)
        return self.coupling.inverse(a_out, b_out, b, f), b

    def take_extra(self) -> Any:
        """Return the extra output and forget it: it refers to the graph, which refers to the step."""
        extra, self.extra = self.extra, None
        return extra

    def arguments(self) -> list[Tensor]:
        """Return the tensors among the call's arguments."""
        if not self.args and not self.kwargs:
            return []
        return [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    def again(self) -> Step:
        """Return the step for another run of its block, to be held by a frame: with the arguments as they are now.

        Tensors among them are without their graph, which may refer to the frame. Dicts and lists are copies, as the
        block or their owner may fill them anew.
        """
        if not self.args and not self.kwargs:
            return self
        args, kwargs = without_graphs((tuple(self.args), dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs, extra=None)

    def check(self, b: Tensor, f: Any) -> None:
        """Raise TypeError or ValueError if f is no branch for stream b."""
        if f is None and isinstance(self.coupling, Invertible):
            return
        if not isinstance(f, Tensor):
            raise TypeError(
                f"{self.name} returned {type(f).__name__} for its branch; a block returns a tensor, or a tuple, dict or"
                " dataclass that begins with it"
            )
        if f.is_nested:  # of nn.TransformerEncoder, if gradients are off; it has no shape
            return
        if f.shape != (shape := self.coupling.branch_shape(b.shape)):
            raise ValueError(
                f"{self.name} returned shape {list(f.shape)}; for a stream of shape {list(b.shape)} its coupling,"
                f" {self.coupling}, needs {list(shape)}. An invertible step such as SpaceToDepth may change shapes, and"
                " so may the first blocks of a stack, if they stay ordinary ones: ordinary=1"
            )
        if f.dtype is not b.dtype and torch.promote_types(f.dtype, b.dtype) != b.dtype:
            raise TypeError(f"{self.name} returned {f.dtype} for a stream of {b.dtype}; set stream_dtype={f.dtype}")


def check_on_grid(x: Tensor, coupling: Coupling, bits: int, what: str) -> None:
    """Raise ValueError if a tensor is too large to be exact on the grid of these bits, where the coupling runs."""
    if not x.numel() or x.is_meta or is_fake(x):
        return
    limit, largest = coupling.limit(x.dtype), x.detach().abs().amax().item()
    if largest < limit:
        return
    fewer = bits - math.floor(math.log2(largest / limit)) - 1 if math.isfinite(largest) else -1
    if math.isnan(largest):
        way_out = "find what makes it"
    else:
        way_out = f"set grid_bits={fewer}" if fewer >= 0 else "set stream_dtype=torch.float64, or take smaller outputs"
    raise ValueError(
        f"{what} reaches {largest:.3g}, and on the grid of grid_bits={bits} it must stay below {limit:.3g} to"
        f" be exact; {way_out}"
    )
