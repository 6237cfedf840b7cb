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
from lightning_revlib.nn.stacks.options import read_budget

MOST = 1 << 20  # pairs of blocks, or pieces of a sequence
PIECE = 32  # tokens
TOO_MANY = 1 << 62  # bytes
MARGIN = 0.05  # of what is free on the device, for what kernels take beside tensors


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
    depth: int | None  # the most blocks of the given length, if one is given
    length: int | None  # the longest sequence at the given depth, likewise


def search(width: int, depth: int | None, length: int | None, limit: int, device: torch.device) -> Iterator[Largest]:
    """For each contestant; right to a sixteenth, 0 if nothing fits."""
    for contestant in SHOWN:

        def blocks(pairs: int, contestant: Contestant = contestant) -> int:
            return step_bytes(contestant, Size(2 * pairs, width, 1), length or 0, limit, device)

        def tokens(pieces: int, contestant: Contestant = contestant) -> int:
            return step_bytes(contestant, Size(depth or 0, width, 1), PIECE * pieces, limit, device)

        yield Largest(contestant.name, length and 2 * most(blocks, limit), depth and PIECE * most(tokens, limit))


def most(bytes_of: Callable[[int], int], limit: int) -> int:
    """The largest number that takes no more bytes than the limit, to a sixteenth.

    Steps along the line through the last two that fit, none to more than four times the last; once one does not fit,
    back, twice as far each time, but no further than half way.
    """
    less = fewer = low = taken = 0  # two numbers that fit, and their bytes
    high, aim, back = MOST, 1, 0
    while True:
        if (found := bytes_of(aim)) <= limit:
            less, fewer, low, taken = low, taken, aim, found
        else:
            high, back = aim, max(1, 2 * back, aim // 16)
        if high - low <= max(1, low // 16):
            return low
        if high < MOST:
            aim = max((low + high) // 2, high - back)
        else:
            line = low + (limit - taken) * (low - less) // max(1, taken - fewer)
            aim = min(MOST - 1, 4 * low, max(low + max(1, low // 16), line - line // 32))


def step_bytes(contestant: Contestant, size: Size, length: int, limit: int, device: torch.device) -> int:
    """What weights, gradients and a training step take: on CUDA as allocated, `TOO_MANY` if it runs out of them."""
    gc.collect()
    cuda = device.type == "cuda"
    try:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info(device)[1], device)
        workload = replace(WORKLOADS["transformer"], sample=(length, 0))
        with device:
            stack = workload.stack(size)
        module, x = execute(contestant, stack, draws=False), workload.input(size, device=device, requires_grad=True)
        if cuda:
            measure.step(module, x)
            return torch.cuda.max_memory_allocated(device)
        weights = sum(2 * p.nbytes for p in module.parameters())
        return weights + (measure.counted(module, x)[1] if weights <= limit else 0) + x.nbytes
    except torch.cuda.OutOfMemoryError:
        return TOO_MANY
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def read_limit(value: Any, device: torch.device) -> int:
    """Bytes; for True, what is free on the CUDA device, less a margin, and 32 MiB on CPU. Raises ValueError."""
    if value is True:
        return int(torch.cuda.mem_get_info(device)[0] * (1 - MARGIN)) if device.type == "cuda" else 32 << 20
    try:
        limit = read_budget(value)
    except (TypeError, ValueError):
        limit = None
    if not isinstance(limit, int):
        raise ValueError(f"largest={value!r}: pass bytes, such as 2GiB, or true for what the device has")
    return limit


def words(one: Largest) -> str:
    parts = [f"{n:,} {unit}" for n, unit in ((one.depth, "blocks"), (one.length, "tokens")) if n is not None]
    return ", ".join(parts)


def show(found: list[Largest], width: int, depth: int | None, length: int | None, limit: int) -> str:
    columns = [] if length is None else [f"blocks, of {length:,} tokens"]
    columns += [] if depth is None else [f"tokens, in {depth} blocks"]
    lines = [[one.contestant, *[f"{n:,}" for n in one[1:] if n is not None]] for one in found]
    return f"## The largest in {format_bytes(limit)}, width {width}\n\n{table(['', *columns], lines)}"
