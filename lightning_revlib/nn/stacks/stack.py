"""What all stacks share: their options, and how an input becomes two streams and two streams an output."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_revlib.nn.coupling.base import Coupling, Streams, dense
from lightning_revlib.nn.coupling.grid import grid_limit, round_to_grid
from lightning_revlib.nn.internals import in_transform
from lightning_revlib.nn.stacks.options import Resolved, StackOptions
from lightning_revlib.nn.steps.step import check_on_grid
from lightning_revlib.nn.treatments.run import Run

# Of the grid that `grid_bits="auto"` chooses: the factor by which streams may exceed what the first forward has met,
# and the most bits; 16 keep five digits of numbers around one.
ROOM, FINEST = 4, 16


class Option:
    """A field of a stack's options as an attribute of the stack; the options are replaced when it is set.

    One that is `fixed` cannot be set, as others follow from it.
    """

    def __init__(self, source: str = "options", *, fixed: bool = False) -> None:
        self.source, self.fixed = source, fixed  # the stack's attribute that has the field

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, stack: Any, owner: type) -> Any:
        return self if stack is None else getattr(getattr(stack, self.source), self.name)

    def __set__(self, stack: Any, value: Any) -> None:
        if self.fixed:
            target = {stack.path: {self.name: value}}
            raise AttributeError(f"{stack.path}: set {self.name} by lightning_revlib.swap(model, {target})")
        setattr(stack, self.source, replace(getattr(stack, self.source), **{self.name: value}))


class Stack:
    """A container of blocks with options."""

    is_stack = True
    path = "stack"  # where the stack is in its model, for errors; `swap` sets it
    options: StackOptions
    resolved: Resolved
    noted: dict[str, Any] | None = None  # what the config of a pretrained model says of the stack
    grid_is_chosen = False  # by grid_bits="auto"
    largest: Tensor | None = None  # of the streams' absolute values, until the grid of `grid_bits="auto"` is chosen
    if TYPE_CHECKING:  # of the container
        training: bool
        _modules: Any

        def __len__(self) -> int: ...
        def __iter__(self) -> Iterator[nn.Module]: ...
        def __getitem__(self, index: Any) -> Any: ...

    split_dim, stream_dtype, context_fn, offload = Option(), Option(), Option(), Option()
    overlap, on_drift, drift_tolerance = Option(), Option(), Option()
    grid_bits, ordinary, residual, branches, chunk_dim = (Option(fixed=True) for _ in range(5))
    couplings, treatments, chunks, budget = (Option("resolved") for _ in range(4))

    def set_options(self, options: StackOptions) -> None:
        """Take options; ValueError or TypeError if they do not fit the blocks, and nothing has changed then."""
        self.check_blocks()
        resolved = options.resolve(self._modules)
        self.options, self.resolved = options, resolved

    def check_blocks(self) -> None:
        """Raise ValueError for a place without a block."""
        if None in self._modules.values():
            raise ValueError(f"{type(self).__name__} has None for a block; put nn.Identity() there, or leave it out")

    def keep_described(self, described: dict[str, Any]) -> None:
        """Keep up to date what the config of a pretrained model says of the stack: its grid, once it is chosen."""
        self.noted = described

    def take_grid(self, bits: int) -> None:
        """Take the grid that grid_bits="auto" has chosen, here or in the run of a checkpoint."""
        self.options = replace(self.options, grid_bits=bits)
        self.grid_is_chosen, self.largest = True, None
        if self.noted is not None:
            self.noted["grid_bits"] = bits
        self.couplings = tuple(c.on_grid(bits) for c in self.couplings)

    def extra_repr(self) -> str:
        couplings = self.couplings[0] if len(self.couplings) == 1 else list(self.couplings)
        return f"split_dim={self.options.split_dim}, coupling={couplings}"

    @property
    def step_count(self) -> int:
        """The number of steps in a forward: of each block one, or one for each of its branches."""
        return (len(self) - self.options.ordinary) * len(self.options.branches or (None,))

    def step_treatments(self) -> tuple[str, ...]:
        """Return the name of each step's treatment. Raises ValueError if it is not known, as blocks were added."""
        treatments = self.resolved.treatments
        if len(treatments) != len(self):  # blocks were appended, or deleted
            if len(set(treatments)) > 1:
                raise ValueError(
                    f"{self.path} has {len(self)} blocks, and was made of {len(treatments)} with treatments of their"
                    " own; make it anew, or name all by lightning_revlib.swap(model, {path: {'treatments': [...]}})"
                )
            treatments = self.treatments = treatments[:1] * len(self)
        each = len(self.options.branches or (None,))
        return tuple(t for t in treatments[self.options.ordinary :] for _ in range(each))

    def split(self, x: Tensor, what: str = "input", *, views: bool = False) -> Streams:
        """Return the streams that an input starts, or that an output ends with. Raises TypeError or ValueError.

        With `views`, they may be views of an input that its caller holds anyway.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"the {what} must be a floating-point tensor, not {getattr(x, 'dtype', type(x).__name__)}")
        if x.layout is not torch.strided and not x.is_nested:
            raise TypeError(f"the {what} is {x.layout}, and streams are dense; pass x.to_dense()")
        options, given = self.options, x
        x = x.resolve_neg()
        if x.is_inference() and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            x = x.clone()  # which autograd can save, and which counts its changes
        if options.stream_dtype is not None or x.dtype in (torch.bfloat16, torch.float16):
            x = x.to(options.stream_dtype or torch.float32)
        if isinstance(options.grid_bits, int):
            x = self._on_grid(x, options.grid_bits)
        if options.split_dim is None:
            return self.couplings[0].start(dense(x))
        _check_size(x, options.split_dim, what)
        is_held = views and x is given and x.is_leaf
        return x.chunk(2, options.split_dim) if is_held else self.halve(x)  # type: ignore[return-value]

    def halve(self, x: Tensor, copy: bool = True) -> Streams:
        """Return the halves of x along `split_dim`, without gaps. Without `copy`, the second may be a view."""
        assert self.options.split_dim is not None
        a, b = x.chunk(2, self.options.split_dim)
        return dense(a), dense(b) if copy else b

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the output that the last streams make."""
        if self.largest is not None:
            self._choose_grid(self.largest)
        if self.options.split_dim is None:
            last: Coupling = self.couplings[(self.step_count - 1) % len(self.couplings)]
            return last.finish(a, b)
        return torch.cat((a, b), self.options.split_dim)

    def close(self, run: Run, a: Tensor, b: Tensor) -> Tensor:
        """Close a run with the streams after its last step, and return the output that they make."""
        return self.join(*run.close(a, b)) if self.options.split_dim is None else run.join(a, b, self.join, self.halve)

    def note_largest(self, a: Tensor, b: Tensor) -> None:
        """Note the largest value of streams, for the grid to be chosen."""
        met = [t.detach().abs().amax() for t in (a, b) if t.numel()]
        self.largest = torch.stack([*met, a.new_zeros(()) if self.largest is None else self.largest]).amax()

    def _choose_grid(self, largest: Tensor) -> None:
        """Choose the finest grid on which streams may become `ROOM` times as large as they are."""
        limit = min(c.on_grid(0).limit(largest.dtype) for c in self.couplings) / ROOM
        if not largest < limit:
            raise ValueError(
                f"{self.path}: the streams reach {largest.item():.3g}, and grid_bits='auto' finds no grid for them in"
                f" {largest.dtype}; set stream_dtype=torch.float64, or leave out grid_bits"
            )
        self.take_grid(min(FINEST, math.floor(math.log2(limit / max(largest.item(), 1.0)))))

    def _on_grid(self, x: Tensor, bits: int) -> Tensor:
        if x.is_nested:
            raise TypeError(
                f"grid_bits={bits}: {self.path} got a nested tensor, which torch cannot round; set"
                " use_nested_tensor = False on your nn.TransformerEncoder"
            )
        if in_transform():
            raise RuntimeError(
                f"grid_bits={bits}: torch.func.jvp and vmap cannot run {self.path}, which rounds and looks at values;"
                " set grid_bits=None by a swap, or call it without the transform"
            )
        grid_limit(x.dtype, bits)
        strictest = min(self.couplings, key=lambda coupling: coupling.limit(x.dtype))
        check_on_grid(x, strictest, bits, f"{self.path}: its input")
        return round_to_grid(x, bits)


def _check_size(x: Tensor, dim: int, what: str) -> None:
    """Raise TypeError or ValueError if x cannot be halved along a dimension."""
    if x.is_nested:
        raise TypeError(
            f"split_dim={dim}: an {what} that is a nested tensor cannot be halved; take split_dim=None, which runs it"
            " on both streams, or pad it by to_padded_tensor(0.0)"
        )
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"split_dim={dim} is out of range for an {what} of shape {list(x.shape)}")
    if x.shape[dim] % 2:
        raise ValueError(
            f"split_dim={dim}: size {x.shape[dim]} of an {what} of shape {list(x.shape)} cannot be halved;"
            " pad it to an even size, take another dimension, or split_dim=None to run the input on both streams"
        )
