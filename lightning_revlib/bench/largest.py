"""The most blocks, and the longest sequence, of which a training step fits in so many bytes.

A transformer's attention and feed-forward in turn, one sequence a batch. On CUDA a size fits if its step runs within
the bytes; on CPU, where there is no telling, if what is counted does: weights, gradients, and the peak in backward.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_revlib.bench import measure
from lightning_revlib.bench.cell import execute
from lightning_revlib.bench.contestants import CONTESTANTS, Contestant
from lightning_revlib.bench.tables import table
from lightning_revlib.bench.workloads import WORKLOADS, Size
from lightning_revlib.nn import CoupledSequential, ReversibleSequential
from lightning_revlib.nn.meter import format_bytes
from lightning_revlib.nn.options import read_budget

MOST = 1 << 20  # blocks or tokens


def in_chunks(stack: CoupledSequential, draws: bool) -> nn.Module:
    """Ours; the feed-forward in four chunks of the sequence."""
    return ReversibleSequential(*stack, **{**stack.given, "chunks": [1, 4], "chunk_dim": 1})


NAMES = ("plain", "checkpoint", "checkpoint, root of N", "lightning_revlib")
SHOWN = [
    *[c for c in CONTESTANTS if c.name in NAMES],
    Contestant("lightning_revlib, feed-forward in 4 chunks", in_chunks, "lightning_revlib"),
]


class Largest(NamedTuple):
    contestant: str
    depth: int  # the most blocks of the given length
    length: int  # the longest sequence at the given depth


def search(size: Size, length: int, limit: int, device: torch.device) -> Iterator[Largest]:
    """For each contestant; depth and length are right to a sixteenth, 0 if nothing fits."""
    for contestant in SHOWN:

        def fits(depth: int, tokens: int, contestant: Contestant = contestant) -> bool:
            return _fits(contestant, size._replace(depth=depth), tokens, limit, device)

        yield Largest(
            contestant.name,
            2 * most(lambda pairs: fits(2 * pairs, length)),
            32 * most(lambda pieces: fits(size.depth, 32 * pieces)),
        )


def most(fits: Callable[[int], bool]) -> int:
    """The largest number for which `fits`, to a sixteenth: doubled until it does not, then by bisection."""
    low, high = 0, 1
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(contestant: Contestant, size: Size, length: int, limit: int, device: torch.device) -> bool:
    gc.collect()
    weights = 0
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info(device)[1], device)
        workload = replace(WORKLOADS["transformer"], sample=(length, 0))
        module = execute(contestant, workload.stack(size).to(device), draws=False)
        x = workload.input(size, device=device, requires_grad=True)
        weights = sum(2 * p.nbytes for p in module.parameters())
        if device.type == "cuda":
            measure.step(module, x)
            return True
        return weights <= limit and weights + measure.counted(module, x)[1] + x.nbytes <= limit
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def read_limit(value: Any, device: torch.device) -> int:
    """Bytes; for True, what is free on the CUDA device, and 32 MiB on CPU. Raises ValueError."""
    if value is True:
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 32 << 20
    try:
        limit = read_budget(value)
    except (TypeError, ValueError):
        limit = None
    if not isinstance(limit, int):
        raise ValueError(f"largest={value!r}: pass bytes, such as 2GiB, or true for what the device has")
    return limit


def show(found: list[Largest], size: Size, length: int, limit: int) -> str:
    lines = [[one.contestant, f"{one.depth:,}", f"{one.length:,}"] for one in found]
    columns = ["", f"blocks, of {length:,} tokens", f"tokens, in {size.depth} blocks"]
    return f"## The largest in {format_bytes(limit)}, width {size.width}\n\n{table(columns, lines)}"
