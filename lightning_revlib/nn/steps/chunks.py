"""Steps done chunk by chunk, for which backward holds what a block saves for one chunk of its input, not for all of it.

A step on n chunks of its streams is n steps, each of which leaves the other chunks as they are. Each has a frame of its
own, which is run again when backward comes to it, and has given away what it caught when the next one's turn comes.
FLOPs stay 4/3 of plain. It is what Reformer (https://arxiv.org/abs/2001.04451, section 3) does to its feed-forward
layers, for any block and dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils._pytree import tree_leaves

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.steps.branches import Branch, BranchSpec
from lightning_revlib.nn.steps.step import Step

if TYPE_CHECKING:
    from lightning_revlib.nn.engine.frame import Frame
    from lightning_revlib.nn.engine.recording import Recording


class Chunk:
    """A chunk of a step's streams: which one of how many, along which dimension."""

    __slots__ = ("count", "dim", "number")

    def __init__(self, number: int, count: int, dim: int) -> None:
        self.number, self.count, self.dim = number, count, dim

    def of(self, stream: Tensor) -> Tensor:
        return stream.chunk(self.count, self.dim)[self.number]


class ChunkedStep(Step):
    """A step that is done on `count` chunks of its streams along dimension `dim`, or fewer if there are no more."""

    __slots__ = ("count", "dim")
    count: int
    dim: int

    def run(self, a: Tensor, b: Tensor, compiler: Any = None, branch: Any = None) -> Streams:
        run = super().run
        return self._each(a, b, lambda chunk, a, b: run(a, b, compiler, branch))

    def record(self, recording: Recording, a: Tensor, b: Tensor) -> Streams:
        return self._each(a, b, lambda chunk, a, b: recording.step(self, a, b, chunk))

    def inverse(self, a_out: Tensor, b_out: Tensor) -> Streams:
        done = list(map(super().inverse, self._split(a_out), self._split(b_out)))
        return join(done, 0, self.dim), join(done, 1, self.dim)

    def _split(self, stream: Tensor) -> Sequence[Tensor]:
        if not -stream.ndim <= self.dim < stream.ndim:
            raise ValueError(f"chunk_dim={self.dim} is out of range for streams of shape {list(stream.shape)}")
        return stream.chunk(self.count, self.dim)

    def _each(self, a: Tensor, b: Tensor, run: Callable[[Chunk, Tensor, Tensor], Streams]) -> Streams:
        given = self.call.given(self.args, self.kwargs) if isinstance(self.call, Branch) else (self.args, self.kwargs)
        if tensors := [t for t in tree_leaves(given) if isinstance(t, Tensor)]:
            raise ValueError(
                f"chunks={self.count}: {self.name} is called with a tensor of shape {list(tensors[0].shape)} besides"
                " its stream, and it is not known which chunks of that are meant; give this block chunks=1 in a list of"
                " them, or make the parts that take no such tensor steps of their own, by branches"
            )
        parts = list(zip(self._split(a), self._split(b), strict=True))
        done: list[Streams] = []
        for number, (x, y) in enumerate(parts):
            done.append(run(Chunk(number, self.count, self.dim), x, y))
            if self.extra is not None:
                raise TypeError(
                    f"chunks={self.count}: {self.name} returned more than a tensor, and it is not known how to join the"
                    " rest of its chunks; give this block chunks=1 in a list of them"
                )
        whole = b if all(x is y for (x, _), (_, y) in zip(done, parts, strict=True)) else join(done, 0, self.dim)
        return whole, join(done, 1, self.dim)


class Undoing:
    """The streams before a step, while its chunks are undone, the last one first."""

    def __init__(self, out: Streams) -> None:
        self.out = out
        self.a: Tensor | None = None
        self.b: Tensor | None = None

    def undo(self, frame: Frame) -> Streams:
        chunk = frame.chunk
        assert chunk is not None
        out = chunk.of(self.out[0]), chunk.of(self.out[1])
        b = frame.coupling.recover(*out)
        a = frame.replay(b, out)
        if self.a is None or self.b is None:
            self.a = torch.empty_like(self.out[1])
            self.b = self.out[0] if b is out[0] else torch.empty_like(self.out[0])
        chunk.of(self.a).copy_(a)
        if b is not out[0]:
            chunk.of(self.b).copy_(b)
        return self.a, self.b


def join(parts: Sequence[Streams], which: int, dim: int) -> Tensor:
    return torch.cat([part[which] for part in parts], dim)


def read_chunks(chunks: int | Sequence[int], dim: int) -> tuple[int, ...]:
    """How many chunks to make of each step's streams, in turn. Raises ValueError or TypeError."""
    counts = tuple(chunks) if isinstance(chunks, Sequence) and not isinstance(chunks, str) else (chunks,)
    if not counts or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in counts):
        raise ValueError(f"chunks={chunks!r}: pass how many chunks a block's input is cut into, at least 1, or a list")
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"chunk_dim={dim!r}: pass the dimension that is cut as an int")
    return counts


def check_chunks(counts: Sequence[int], blocks: Mapping[str, nn.Module], branches: Sequence[BranchSpec]) -> None:
    """Raise where a step's result for the whole is not that for its chunks, as far as can be told."""
    specs: Sequence[BranchSpec | None] = branches or [None]
    steps = [(key, block, spec) for key, block in blocks.items() for spec in specs]
    for (key, block, spec), count in zip(steps, cycle(counts)):
        named = {name: getattr(block, name) for name in ([] if spec is None or callable(spec) else spec)}
        parts = [part for part in named.values() if isinstance(part, nn.Module)] if named else [block]
        norms = [m for part in parts for m in part.modules() if isinstance(m, _BatchNorm) or _averages(m)]
        if count > 1 and norms:
            path = next(".".join(filter(None, [key, name])) for name, m in block.named_modules() if m is norms[0])
            raise ValueError(
                f"chunks={count}: {path} ({type(norms[0]).__name__}) takes its statistics over the whole batch, not of"
                " chunks; give this block chunks=1 in a list of them, or another norm"
            )


def _averages(m: nn.Module) -> bool:
    return isinstance(m, _NormBase) and bool(m.track_running_stats)
