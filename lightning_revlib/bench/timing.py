"""Time several contestants in turns, and compare their times."""

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
    """Return the seconds of a step of each module, round after round until `seconds` are over.

    The order is drawn anew in each round. The machine's speed changes in time and is alike within a round, so compare
    by ratios within rounds. Unless the modules are `warm`, one more round comes first and does not count.
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
    """Return the median of a / b over the rounds, and its interval of 95 % from order statistics."""
    return _middle(_ratios(a, b))


def over_fastest(own: Sequence[float], others: Mapping[str, Sequence[float]]) -> tuple[float, float, float]:
    """Return the median of own times over those of the fastest of the others, and its interval of 95 %.

    In each half of the rounds the fastest is chosen by the other half. In the same rounds, one of several equally fast
    contestants would be chosen because its times happened to be low, and own times would look worse beside it.
    """
    half, ratios = len(own) // 2, []
    for chosen_by, taken in (slice(half), slice(half, None)), (slice(half, None), slice(half)):
        medians = {name: statistics.median(_ratios(own[chosen_by], t[chosen_by])) for name, t in others.items()}
        fastest = max(medians, key=lambda name: medians[name])
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
    """Exclude all present objects from garbage collection until the outermost of these contexts ends.

    A collection that visits the objects of all imported libraries takes a third of a second. A process that has
    excluded some already is left as it is.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _no_collector() -> Iterator[None]:
    """Disable garbage collection in the context."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
