"""One step of one call of a stack: the block, its coupling and its arguments."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import set_eval_frame
from torch.utils._pytree import tree_leaves

from lightning_revlib.nn.coupling.base import Coupling, Streams
from lightning_revlib.nn.coupling.standard import Invertible
from lightning_revlib.nn.stacks.options import Treatment
from lightning_revlib.nn.state.parameters import version

if TYPE_CHECKING:
    from lightning_revlib.nn.stacks.sequential import CoupledSequential

Call: TypeAlias = tuple[Sequence[Any], Mapping[str, Any]]
Branch: TypeAlias = Callable[[Tensor, Any], tuple[Any, Any]]


class Step:
    """What a stack runs and the engine runs again. `extra` is what the block has returned besides its branch."""

    __slots__ = ("args", "call", "coupling", "dtype", "extra", "key", "kwargs", "module", "stack", "treatment")

    def __init__(
        self, stack: CoupledSequential, key: str, module: nn.Module, coupling: Coupling, dtype: torch.dtype, call: Call,
        treatment: Treatment,
    ) -> None:  # fmt: skip
        self.stack, self.key, self.module, self.coupling, self.dtype = stack, key, module, coupling, dtype
        self.args, self.kwargs = call
        self.call: Callable[..., Any] = module
        self.extra: Any = None
        self.treatment = treatment

    @property
    def name(self) -> str:
        return f"{self.stack.path}.{self.key} ({type(self.module).__name__})"

    def run(self, a: Tensor, b: Tensor, compiler: Any = None, branch: Branch | None = None) -> Streams:
        """The whole step, by ordinary autograd; `branch` may stand for the method of that name."""
        count = None if torch.compiler.is_compiling() or b.is_inference() else b._version
        f, self.extra = (branch or self.branch)(b, compiler)
        self.check(b, f, count)
        streams = self.bind(a, b).forward(a, b, f)
        if self.stack.grid_bits is not None:
            self.check_grid(streams[1])
        return streams

    def branch(self, b: Tensor, compiler: Any = None) -> tuple[Any, Any]:
        """The block's branch for stream b and what it returns besides, compiled if `compiler` is given.

        (None, None) for an invertible step, which has no block.
        """
        if type(self.coupling) is Invertible:
            return None, None
        x = b if b.dtype is self.dtype else b.to(self.dtype)
        if compiler is None:
            out = self.call(x, *self.args, **self.kwargs)
        else:
            engine = set_eval_frame(compiler)
            try:
                out = self.call(x, *self.args, **self.kwargs)
            finally:
                set_eval_frame(engine)
        f, extra = (out, None) if isinstance(out, Tensor) else self.split(out)
        if self.stack.residual and isinstance(f, Tensor) and (f.is_nested or f.shape == x.shape):
            f = f - x
        return f, extra

    def inverse(self, a_out: Tensor, b_out: Tensor) -> Streams:
        """The streams before the step, from those behind it."""
        b = self.coupling.recover(a_out, b_out)
        f, _ = self.branch(b)
        self.check(b, f, None)
        return self.coupling.inverse(a_out, b_out, b, f), b

    def tensors(self) -> list[Tensor]:
        """Those among the call's arguments."""
        return [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]

    def split(self, out: Any) -> tuple[Any, Any]:
        """What a block returned that is no tensor, as its branch and the rest."""
        return rest_of(out)

    def bind(self, a: Tensor, b: Tensor) -> Coupling:
        return self.coupling.at(a, b, self.stack.training)

    def check(self, b: Tensor, f: Any, count: int | None) -> None:
        """Raise where the block did what a coupling cannot undo; `count` is b's version before it, if known."""
        self._check_branch(b, f)
        if count is not None and b._version != count:
            raise RuntimeError(
                f"{self.name} changes its input in place, and with it the stream that the next block sees;"
                " use inplace=False in its first operation"
            )

    def check_arguments(self, arguments: Sequence[tuple[Tensor, int]]) -> None:
        """Raise where the block has changed an argument in place, given its version before, and would do so again."""
        for t, count in arguments:
            if version(t) != count:
                raise RuntimeError(
                    f"{self.name} changes an argument of shape {list(t.shape)} in place, and backward has to run it"
                    " again on the same; use the operation that is not in-place, or treatment 'store' for this block"
                )

    def _check_branch(self, b: Tensor, f: Any) -> None:
        if f is None and type(self.coupling) is Invertible:
            return
        if not isinstance(f, Tensor):
            raise TypeError(
                f"{self.name} returned {type(f).__name__} for its branch; a block returns a tensor, or a tuple, dict or"
                " dataclass that begins with it"
            )
        if f.is_nested:  # of nn.TransformerEncoder, where gradients are off; it has no shape
            return
        if f.shape != (shape := self.coupling.branch_shape(b.shape)):
            raise ValueError(
                f"{self.name} returned shape {list(f.shape)}; for a stream of shape {list(b.shape)} its coupling,"
                f" {self.coupling}, needs {list(shape)}. An invertible step such as SpaceToDepth may change shapes, and"
                " so may the first blocks of a stack, if they stay ordinary ones: ordinary=1"
            )
        if f.dtype is not b.dtype and torch.promote_types(f.dtype, b.dtype) != b.dtype:
            raise TypeError(f"{self.name} returned {f.dtype} for a stream of {b.dtype}; set stream_dtype={f.dtype}")

    def check_grid(self, stream: Tensor) -> None:
        """Raise where an exact stream becomes too large to be exact."""
        limit = getattr(self.coupling, "limit", None)
        if limit is None or not stream.numel():  # an invertible step, an empty batch
            return
        largest = stream.detach().abs().amax().item()
        if not largest < limit(stream.dtype):
            raise ValueError(
                f"{self.name}: the stream reaches {largest:.3g}, and on the grid of grid_bits={self.stack.grid_bits} it"
                f" must stay below {limit(stream.dtype):.3g} to be exact; take fewer grid_bits, or smaller outputs"
            )


def rest_of(out: Any) -> tuple[Any, Any]:
    """The first member of what a block returned, and the others: a tuple, or a dict by name."""
    if isinstance(out, Mapping):
        names = list(out)
        return (out[names[0]], {name: out[name] for name in names[1:]}) if names else (out, None)
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        names = [field.name for field in dataclasses.fields(out)]
        return getattr(out, names[0]), {name: getattr(out, name) for name in names[1:]}
    if isinstance(out, Sequence) and len(out):
        return out[0], tuple(out[1:])
    return out, None


def with_first(out: Any, first: Any) -> Any:
    """What a block returned with its first member replaced; the same type."""
    if isinstance(out, Mapping):  # before dataclasses: some are both
        copied = copy.copy(out)
        copied[next(iter(out))] = first  # type: ignore[index]
        return copied
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        return dataclasses.replace(out, **{dataclasses.fields(out)[0].name: first})
    if hasattr(out, "_fields"):
        return out._replace(**{out._fields[0]: first})
    if isinstance(out, Sequence) and len(out):
        return type(out)([first, *out[1:]])  # type: ignore[call-arg]
    return out
