"""Whether a training step fits into a memory: the ways to run its stacks, and the largest size that fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lightning_revlib.accounting.step import Program, count
from lightning_revlib.nn.convert.swap import Targets, restore, stacks, swap
from lightning_revlib.nn.plan.budget import Budget, share_budget

TRIES, EXACT = 8, 0.02  # of the search: its steps, and the share of the memory that may stay free at its end


class Way(NamedTuple):
    """A way to run a model's stacks, and a function that makes the model run so."""

    name: str
    apply: Callable[[Any], Any]


def ways(targets: Targets | None) -> list[Way]:
    """Return the ways to run the stacks of a model, those with the least work first."""

    def checkpointed(model: Any) -> None:
        for path in swap(model, targets):
            count = len(model.get_submodule(path))
            swap(model, {path: {"treatments": ["checkpoint"] * count}})

    return [
        Way("plain", restore),
        Way("checkpointed", checkpointed),
        Way("reversible", lambda model: swap(model, targets)),
    ]


def fill(program: Program, memory: int) -> tuple[int, str] | None:
    """Return the bytes of a step whose stacks, which run reversibly, have what is left of a memory, and their plan.

    None if the step does not fit. The stacks keep the budget.
    """
    found, probe = stacks(program.model), Budget("1000TiB")
    share_budget(found, probe)
    count(program)
    share_budget(found, None)
    left = memory - count(program).highest.total
    if left < 0 or probe.plan is None:
        return None
    budget = Budget(probe.plan.minimum + left)
    share_budget(found, budget)
    total = count(program).highest.total
    return (total, str(budget.plan).partition("\n")[0]) if total <= memory else None


def largest(bytes_of: Callable[[int], int], memory: int, first: int, unit: int = 1) -> int | None:
    """Return the largest multiple of a unit whose bytes fit into a memory, found by secants, or None.

    Args:
        bytes_of: of a size; it grows with the size, about linearly.
        memory: in bytes.
        first: a size to begin with.
        unit: sizes are multiples of it.
    """
    known = {size: bytes_of(size) for size in (first, 2 * first)}
    for turn in range(TRIES):
        (a, bytes_a), (b, bytes_b) = _around(known, memory)
        guess = a + (memory - bytes_a) / max(1, bytes_b - bytes_a) * (b - a)
        if turn % 2 and bytes_a <= memory < bytes_b:
            guess = (a + b) / 2  # lest one end stay where it is
        guess = int(guess) // unit * unit
        if guess < unit or guess in known:
            break
        known[guess] = bytes_of(guess)
        if (1 - EXACT) * memory <= known[guess] <= memory:
            break
    return max((size for size, found in known.items() if found <= memory), default=None)


def _around(known: dict[int, int], memory: int) -> list[tuple[int, int]]:
    """Return two sizes with their bytes: the last that fits and the next one, or else the two at that end."""
    sizes = sorted(known.items())
    fitting = sum(found <= memory for _, found in sizes)
    begin = min(max(fitting - 1, 0), len(sizes) - 2)
    return sizes[begin : begin + 2]
