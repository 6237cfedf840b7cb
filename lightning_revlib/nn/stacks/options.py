"""A stack's options in the forms in which users give them, checked, and as the stack keeps them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from lightning_revlib.nn.coupling.base import Coupling
from lightning_revlib.nn.coupling.standard import CouplingSpec, Pair, get_coupling

CouplingFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Treatment: TypeAlias = Literal["reversible", "checkpoint", "selective", "offload", "store"]
MemoryBudget: TypeAlias = int | float | str
OnDrift: TypeAlias = Literal["ignore", "warn_once", "warn", "raise"]
UNITS = {"b": 1} | {
    prefix + unit: base**power
    for unit, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate("kmgt", start=1)
}


def read_couplings(
    coupling: CouplingSpec | Sequence[CouplingSpec],
    forward: CouplingFunction | Sequence[CouplingFunction] | None,
    inverse: CouplingFunction | Sequence[CouplingFunction] | None,
) -> tuple[Coupling, ...]:
    """One coupling or more, from names, mappings, couplings or pairs of callables. Raises ValueError."""
    if forward is None and inverse is None:
        many = coupling if isinstance(coupling, Sequence) and not isinstance(coupling, str) else [coupling]
        if not many:
            raise ValueError(f"coupling={coupling!r} is empty; name at least one, such as 'additive'")
        return tuple(get_coupling(one) for one in many)
    if forward is None or inverse is None:
        given, missing = ("coupling_forward", "coupling_inverse")[:: 1 if inverse is None else -1]
        raise ValueError(f"{given} was given without {missing}: the engine needs both directions of your coupling")
    forwards = list(forward) if isinstance(forward, Sequence) else [forward]
    inverses = list(inverse) if isinstance(inverse, Sequence) else [inverse]
    if len(forwards) != len(inverses) or not forwards:
        raise ValueError(
            f"coupling_forward has {len(forwards)} entries and coupling_inverse {len(inverses)}; pass as many of each,"
            " and at least one"
        )
    return tuple(Pair(f, g) for f, g in zip(forwards, inverses, strict=True))


def read_treatments(treatments: Sequence[Treatment] | None, store_last: int, count: int) -> tuple[Treatment, ...]:
    """A treatment for each of `count` blocks. Raises ValueError."""
    if not isinstance(store_last, int) or not 0 <= store_last <= count:
        raise ValueError(f"store_last={store_last!r}: the stack has {count} blocks; take a number from 0 to {count}")
    if treatments is None:
        treatments = [*["reversible"] * (count - store_last), *["store"] * store_last]  # type: ignore[list-item]
        return tuple(treatments)
    if store_last:
        raise ValueError(f"treatments={list(treatments)!r} and store_last={store_last} say the same; pass one of them")
    if len(treatments) != count or not set(treatments) <= set(get_args(Treatment)):
        raise ValueError(
            f"treatments={list(treatments)!r}: pass one of {', '.join(map(repr, get_args(Treatment)))} for each of"
            f" {count} blocks"
        )
    return tuple(treatments)


def read_budget(value: MemoryBudget) -> int | float | None:
    """Bytes as an int, a fraction as a float, None for "auto". Raises ValueError or TypeError."""
    if isinstance(value, str):
        if value == "auto":
            return None
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", value.lower())
        if match and match[2] in {"", *UNITS} and 1 <= (count := float(match[1]) * UNITS[match[2] or "b"]) < math.inf:
            return int(count)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"memory_budget={value!r}: pass bytes, a text such as '2GiB', a fraction, or 'auto'")
    elif (isinstance(value, int) and value > 0) or 0 < value <= 1:
        return value
    raise ValueError(
        f"memory_budget={value!r}: pass a positive number of bytes as an int or a text such as '2GiB' or '800MB', a"
        " fraction of ordinary autograd's peak between 0.0 and 1.0 as a float, not a text, or 'auto' on a CUDA device"
    )
