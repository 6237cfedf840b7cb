"""Steps by chunks: backward holds what a block saves for one chunk of its input, not for all of it.

A step by n chunks is n steps in turn, each of which leaves the other chunks as they are. Backward runs the block again
for one chunk at a time. FLOPs stay 4/3 of plain. Reformer (https://arxiv.org/abs/2001.04451, section 3) does this to
its feed-forward layers; here it works for any block and dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.state.norm_statistics import COUNTS_BATCHES
from lightning_revlib.nn.steps.branches import Branch, BranchSpec, is_list
from lightning_revlib.nn.steps.step import Step


@dataclass(frozen=True, slots=True)
class Chunk:
    """The place of a chunk in a step's streams: its number among `count`, and the dimension that is cut."""

    number: int
    count: int
    dim: int
    is_last: bool

    def of(self, stream: Tensor) -> Tensor:
        """Return this chunk of a stream."""
        return stream.chunk(self.count, self.dim)[self.number]


@dataclass(slots=True)
class ChunkedStep(Step):
    """A step that runs on one chunk of its streams after another: at most `count` of them, along dimension `dim`."""

    count: int = 1
    dim: int = 0

    def run(self, a: Tensor, b: Tensor, compiler: Any = None, branch: Any = None) -> Streams:
        return self.each(a, b, lambda a, b, chunk: Step.run(self, a, b, compiler, branch))

    def inverse(self, a_out: Tensor, b_out: Tensor) -> Streams:
        done = [Step.inverse(self, a, b) for a, b in zip(self._parts(a_out), self._parts(b_out), strict=True)]
        return join(done, 0, self.dim), join(done, 1, self.dim)

    def each(self, a: Tensor, b: Tensor, run: Callable[[Tensor, Tensor, Any], Streams]) -> Streams:
        self._check_given()
        parts = list(zip(self._parts(a), self._parts(b), strict=True))
        done: list[Streams] = []
        for number, (x, y) in enumerate(parts):
            done.append(run(x, y, Chunk(number, self.count, self.dim, number == len(parts) - 1)))
            if self.extra is not None:
                raise TypeError(
                    f"chunks={self.count}: {self.name} returned more than a tensor, and it is not known how to join the"
                    " rest of its chunks; give this block chunks=1 in a list of them"
                )
        whole = b if all(x is y for (x, _), (_, y) in zip(done, parts, strict=True)) else join(done, 0, self.dim)
        return whole, join(done, 1, self.dim)

    def _parts(self, stream: Tensor) -> Sequence[Tensor]:
        if stream.is_nested:
            raise TypeError(f"chunks={self.count}: {self.name} got a nested tensor, which cannot be cut; take chunks=1")
        if not -stream.ndim <= self.dim < stream.ndim:
            raise ValueError(f"chunk_dim={self.dim} is out of range for streams of shape {list(stream.shape)}")
        return stream.chunk(self.count, self.dim)

    def _check_given(self) -> None:
        given = self.call.given(self.args, self.kwargs) if isinstance(self.call, Branch) else (self.args, self.kwargs)
        if tensors := [t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)]:
            raise ValueError(
                f"chunks={self.count}: {self.name} is called with a tensor of shape {list(tensors[0].shape)} besides"
                " its stream, and it is not known which chunks of that are meant; give this block chunks=1 in a list of"
                " them, or make the parts that take no such tensor steps of their own, by branches"
            )


def join(parts: Sequence[Streams], which: int, dim: int) -> Tensor:
    """Return stream a (0) or b (1), joined from its chunks."""
    return torch.cat([part[which] for part in parts], dim)


def read_chunks(chunks: int | Sequence[int], dim: int) -> tuple[int, ...]:
    """Return the number of chunks of each step's streams, in turn. Raise ValueError or TypeError for wrong options."""
    counts: tuple[Any, ...] = tuple(chunks) if is_list(chunks) else (chunks,)  # type: ignore[arg-type]
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in counts):
        raise ValueError(f"chunks={chunks!r}: pass how many chunks a block's input is cut into, at least 1, or a list")
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"chunk_dim={dim!r}: pass the dimension that is cut as an int")
    return counts


def check_chunks(counts: Sequence[int], blocks: Mapping[str, nn.Module], branches: Sequence[BranchSpec]) -> None:
    """Raise ValueError if a step's result for the whole is not that for its chunks, as far as can be told."""
    specs: Sequence[BranchSpec | None] = branches or [None]
    for ((key, block), spec), count in zip(product(blocks.items(), specs), cycle(counts)):
        inside = {m for part in _modules_of(block, spec) for m in part.modules()}
        for path, m in block.named_modules() if count > 1 else ():
            if m in inside and _reads_whole_batch(m):
                raise ValueError(
                    f"chunks={count}: {f'{key}.{path}'.rstrip('.')} ({type(m).__name__}) takes its statistics over the"
                    " whole batch, not of chunks; give this block chunks=1 in a list of them, or another norm"
                )


def _modules_of(block: nn.Module, spec: BranchSpec | None) -> list[nn.Module]:
    """Return the parts of a block that a branch names, methods left out; the block if they are not named."""
    if spec is None or callable(spec):
        return [block]
    return [part for name in spec if isinstance(part := getattr(block, name), nn.Module)]


def _reads_whole_batch(m: nn.Module) -> bool:
    """Return whether the module is a batch norm, or another norm with running statistics."""
    return getattr(type(m), "forward", None) in COUNTS_BATCHES or bool(getattr(m, "track_running_stats", False))
