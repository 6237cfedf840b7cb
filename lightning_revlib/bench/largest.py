"""Find the most blocks, and the longest sequence, whose training step fits in a number of bytes.

Blocks are a transformer's attention and feed-forward in turn, with one sequence a batch. On CUDA a size fits if its
step runs within the bytes. On CPU a size fits if weights, gradients and the peak in backward, as counted, do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_revlib.bench import measure
from lightning_revlib.bench.cell import execute
from lightning_revlib.bench.contestants import CONTESTANTS, Contestant, reversible
from lightning_revlib.bench.tables import table
from lightning_revlib.bench.workloads import WORKLOADS, Size
from lightning_revlib.nn import CoupledSequential
from lightning_revlib.nn.meter import format_bytes
from lightning_revlib.nn.plan.limit import read_budget

MOST = 1 << 20  # pairs of blocks, or pieces of a sequence
PIECE = 32  # tokens in a piece
TOO_MANY = 1 << 62  # bytes of a step that runs out of memory
MARGIN = 0.05  # share of the device's free bytes that is left for kernels' workspaces


def in_chunks(stack: CoupledSequential, draws: bool) -> nn.Module:
    """Make the stack reversible, with the feed-forward in four chunks of the sequence."""
    return reversible(stack, chunks=[1, 4], chunk_dim=1)


NAMES = ("plain", "checkpoint", "checkpoint, root of N", "lightning_revlib")
COMPARED = [
    *[c for c in CONTESTANTS if c.name in NAMES],
    Contestant("lightning_revlib, feed-forward in 4 chunks", in_chunks, "lightning_revlib"),
]


class Largest(NamedTuple):
    """The largest sizes of one contestant; None for a size that was not asked for."""

    contestant: str
    depth: int | None  # the most blocks at the given length
    length: int | None  # the longest sequence at the given depth


def search(
    contestants: Iterable[Contestant],
    width: int,
    depth: int | None,
    length: int | None,
    limit: int,
    device: torch.device,
) -> Iterator[Largest]:
    """Search the largest sizes of each contestant, to a sixteenth; 0 if nothing fits."""
    for contestant in contestants:

        def blocks(pairs: int, contestant: Contestant = contestant) -> int:
            return step_bytes(contestant, Size(2 * pairs, width, 1), length or 0, limit, device)

        def tokens(pieces: int, contestant: Contestant = contestant) -> int:
            return step_bytes(contestant, Size(depth or 0, width, 1), PIECE * pieces, limit, device)

        yield Largest(contestant.name, length and 2 * most(blocks, limit), depth and PIECE * most(tokens, limit))


def most(bytes_of: Callable[[int], int], limit: int) -> int:
    """Return the largest number that takes no more bytes than the limit, to a sixteenth.

    The next number to try lies on the line through the last two that fit, and is at most four times the last. After a
    number that does not fit, each try steps back twice as far as the one before, and at most half way.
    """
    less = fewer = low = taken = 0  # the last two numbers that fit, and their bytes
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
    """Return the bytes of weights, gradients and a training step; `TOO_MANY` if CUDA runs out of memory."""
    cuda = device.type == "cuda"
    try:
        if cuda:
            gc.collect()
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
    """Return a limit in bytes; True is the CUDA device's free bytes less a margin, or 32 MiB on CPU.

    Raises ValueError for anything but bytes and True.
    """
    if value is True:
        return int(torch.cuda.mem_get_info(device)[0] * (1 - MARGIN)) if device.type == "cuda" else 32 << 20
    try:
        limit = read_budget(value)
    except (TypeError, ValueError):
        limit = None
    if not isinstance(limit, int):
        raise ValueError(f"largest={value!r}: pass bytes, such as 2GiB, or true for what the device has")
    return limit


def describe(one: Largest) -> str:
    """Return the sizes of a contestant as text."""
    parts = [f"{n:,} {unit}" for n, unit in ((one.depth, "blocks"), (one.length, "tokens")) if n is not None]
    return ", ".join(parts)


def section(found: list[Largest], width: int, depth: int | None, length: int | None, limit: int) -> str:
    """Return the Markdown section of all contestants."""
    columns = [] if length is None else [f"blocks, of {length:,} tokens"]
    columns += [] if depth is None else [f"tokens, in {depth} blocks"]
    lines = [[one.contestant, *[f"{n:,}" for n in one[1:] if n is not None]] for one in found]
    return f"## The largest in {format_bytes(limit)}, width {width}\n\n{table(['', *columns], lines)}"
