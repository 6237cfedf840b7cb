"""The times of several contestants, in turns, and how they compare."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_revlib.bench.measure import clear, step


def times(
    modules: Mapping[str, nn.Module],
    x: Tensor,
    seconds: float,
    seed: int = 0,
    rounds: tuple[int, int] = (3, 40),
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds of a step of each, round after round until `seconds` are over; the order is drawn anew in each.

    All contestants meet the same drift of the machine: compare by the ratios within a round. Unless the modules are
    `warm`, another round comes first and does not count.
    """
    found: dict[str, list[float]] = {name: [] for name in modules}
    order, draw = list(modules), random.Random(seed)
    end = time.perf_counter() + seconds
    with frozen(), _no_collector():
        for index in range(warm, rounds[1] + 1):
            draw.shuffle(order)
            for name in order:
                clear(modules[name], x)
                _wait(x)
                start = time.perf_counter()
                step(modules[name], x)
                _wait(x)
                if index:
                    found[name].append(time.perf_counter() - start)
                clear(modules[name], x)
            gc.collect()
            if index >= rounds[0] and time.perf_counter() > end:
                break
    return found


def ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The median of a / b by rounds, and an interval that contains the true one with 95 %, from order statistics."""
    return _middle(_ratios(a, b))


def over_fastest(own: Sequence[float], others: Mapping[str, Sequence[float]]) -> tuple[float, float, float]:
    """The same over the fastest of others.

    Who that is, the other half of the rounds tells: of those that are alike, the one that was lucky would seem fastest
    in the same rounds, and all of them slower than they are beside it.
    """
    half, ratios = len(own) // 2, []
    for told, taken in (slice(half), slice(half, None)), (slice(half, None), slice(half)):
        fastest = max(others, key=lambda name: statistics.median(_ratios(own[told], others[name][told])))
        ratios += _ratios(own[taken], others[fastest][taken])
    return _middle(ratios)


def _ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def _middle(ratios: Sequence[float]) -> tuple[float, float, float]:
    ratios, n = sorted(ratios), len(ratios)
    low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))
    return statistics.median(ratios), ratios[low], ratios[n - 1 - low]


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


@contextmanager
def frozen() -> Iterator[None]:
    """The collector does not look at what is there now until the outermost of these contexts ends.

    With the libraries that are imported that takes a third of a second.
    """
    outermost = not gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if outermost:
            gc.unfreeze()


@contextmanager
def _no_collector() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
