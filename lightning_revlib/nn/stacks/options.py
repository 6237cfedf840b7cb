"""A stack's options: as a user gives them, checked, and as the stack uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn

from lightning_revlib.nn.coupling.base import Coupling
from lightning_revlib.nn.coupling.registry import CouplingFunction, CouplingSpec, read_couplings
from lightning_revlib.nn.engine.saved_tensors import ContextFunction
from lightning_revlib.nn.plan.budget import Budget
from lightning_revlib.nn.plan.limit import MemoryBudget, read_budget
from lightning_revlib.nn.stacks.build import is_invertible
from lightning_revlib.nn.steps.branches import BranchSpec, check_branches, is_list
from lightning_revlib.nn.steps.chunks import check_chunks, read_chunks
from lightning_revlib.nn.treatments.base import TREATMENTS

OnDrift: TypeAlias = Literal["ignore", "warn_once", "warn", "raise"]
# Options that say the same: who gives one of a group in a swap replaces the whole group.
EXECUTION = ("store_last", "treatments", "memory_budget")
RIVALS = ({"coupling", "coupling_forward", "coupling_inverse"}, {*EXECUTION})
CYCLED = ("coupling", "coupling_forward", "coupling_inverse", "chunks")  # if they are lists, over the steps


@dataclass
class Resolved:
    """Options as a stack of certain blocks uses them."""

    couplings: tuple[Coupling, ...]  # cycled over the steps
    treatments: tuple[str, ...]  # one for each block
    chunks: tuple[int, ...]  # cycled over the steps
    budget: Budget | None


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    """The options of a stack; `CoupledSequential` describes each. Raises ValueError or TypeError."""

    split_dim: int | None = 1
    coupling: CouplingSpec | Sequence[CouplingSpec] = "additive"
    coupling_forward: CouplingFunction | Sequence[CouplingFunction] | None = None
    coupling_inverse: CouplingFunction | Sequence[CouplingFunction] | None = None
    stream_dtype: torch.dtype | None = None
    residual: bool = False
    branches: Sequence[BranchSpec] | None = None
    grid_bits: int | Literal["auto"] | None = None
    ordinary: int = 0
    chunks: int | Sequence[int] = 1
    chunk_dim: int = 0
    store_last: int = 0
    treatments: Sequence[str] | None = None
    memory_budget: MemoryBudget | None = None
    offload: bool = False
    overlap: bool = False
    context_fn: ContextFunction | None = None
    on_drift: OnDrift = "warn_once"
    drift_tolerance: float = 1e-2

    def __post_init__(self) -> None:
        """Check what can be checked without the blocks."""
        if self.split_dim is not None and (not isinstance(self.split_dim, int) or isinstance(self.split_dim, bool)):
            raise TypeError(f"split_dim={self.split_dim!r}: pass the dimension to halve as an int, or None")
        if self.on_drift not in get_args(OnDrift):
            raise ValueError(f"on_drift={self.on_drift!r} is none of {', '.join(map(repr, get_args(OnDrift)))}")
        for name in ("residual", "offload", "overlap"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}={value!r}: pass True or False")
        dtype, tolerance = self.stream_dtype, self.drift_tolerance
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"stream_dtype={dtype!r}: pass a floating-point dtype such as torch.float32, or None")
        if not isinstance(tolerance, (int, float)) or not tolerance >= 0:
            raise ValueError(f"drift_tolerance={tolerance!r}: pass a number, at least 0")
        if isinstance(self.treatments, str):
            raise TypeError(f"treatments={self.treatments!r}: pass a list, one treatment for each block")
        if self.context_fn is not None and "selective" in (self.treatments or ()):
            raise ValueError(
                f"context_fn={self.context_fn!r}: treatment 'selective' has contexts of its own; take 'checkpoint' for"
                " its blocks, or leave context_fn out"
            )
        given = [name for name in EXECUTION if getattr(self, name) is not getattr(StackOptions, name)]
        if len(given) > 1:
            values = " and ".join(f"{name}={getattr(self, name)!r}" for name in given)
            raise ValueError(f"{values} say the same; pass one of them")
        if self.memory_budget is not None:
            read_budget(self.memory_budget)
            if self.overlap:
                raise ValueError(
                    f"overlap=True holds what two blocks save, memory_budget={self.memory_budget!r} counts one: pass"
                    " one of them"
                )
        read_chunks(self.chunks, self.chunk_dim)
        self.couplings()

    def merged(self, changes: Mapping[str, Any]) -> StackOptions:
        """Return these options with changes; of options that say the same, the changed ones alone."""
        defaults = {name: getattr(StackOptions, name) for group in RIVALS if group & set(changes) for name in group}
        return replace(self, **(defaults | dict(changes)))

    def couplings(self) -> tuple[Coupling, ...]:
        """Return the couplings, made exact by `grid_bits`."""
        couplings = read_couplings(self.coupling, self.coupling_forward, self.coupling_inverse)
        bits = self.grid_bits
        if bits == "auto":
            _ = [c.on_grid(0) for c in couplings]  # ValueError if one cannot be exact
            return couplings
        if bits is None:
            if needy := [c for c in couplings if c.needs_grid]:
                name = type(needy[0]).__name__.lower()
                raise ValueError(f"coupling {name!r} works on the exact grid only; set grid_bits, such as grid_bits=12")
            return couplings
        if not isinstance(bits, int) or isinstance(bits, bool) or not 0 <= bits < 24:
            raise ValueError(
                f"grid_bits={bits!r}: the grid is 2^-grid_bits; take an int from 0 to 23, such as 12, or 'auto'"
            )
        return tuple(c.on_grid(bits) for c in couplings)

    def resolve(self, blocks: Mapping[str, nn.Module]) -> Resolved:
        """Return the options as a stack of these blocks uses them, by name in their order."""
        if not isinstance(self.ordinary, int) or not 0 <= self.ordinary < len(blocks):
            raise ValueError(
                f"ordinary={self.ordinary!r}: of {len(blocks)} blocks, 0 to {len(blocks) - 1} can be ordinary ones"
            )
        steps = dict(list(blocks.items())[self.ordinary :])
        coupled = {key: m for key, m in steps.items() if not is_invertible(m)}
        if self.branches is not None:
            check_branches(coupled, self.branches, self.residual)
        if self.grid_bits is not None:
            self._check_exactness(steps)
        chunks = read_chunks(self.chunks, self.chunk_dim)
        check_chunks(chunks, coupled, self.branches or ())
        budget = None if self.memory_budget is None else Budget(self.memory_budget)
        return Resolved(self.couplings(), self._treatments(len(blocks)), chunks, budget)

    def _treatments(self, count: int) -> tuple[str, ...]:
        if not isinstance(self.store_last, int) or not 0 <= self.store_last <= count:
            raise ValueError(
                f"store_last={self.store_last!r}: the stack has {count} blocks; take a number from 0 to {count}"
            )
        if self.treatments is None:
            return ("reversible",) * (count - self.store_last) + ("store",) * self.store_last
        if len(self.treatments) != count or not set(self.treatments) <= TREATMENTS.keys():
            raise ValueError(
                f"treatments={list(self.treatments)!r}: pass one of {', '.join(map(repr, TREATMENTS))} for each of"
                f" {count} blocks"
            )
        return tuple(self.treatments)

    def _check_exactness(self, blocks: Mapping[str, nn.Module]) -> None:
        for name, module in blocks.items():
            if is_invertible(module) and not getattr(module, "exact", False):
                raise ValueError(
                    f"grid_bits={self.grid_bits}: invertible step {name} ({type(module).__name__}) is not exact; steps"
                    " that only move numbers, and say so by an attribute `exact`, are"
                )


def options_of_slice(
    options: StackOptions, resolved: Resolved, blocks: Sequence[nn.Module], index: slice
) -> tuple[StackOptions, Resolved]:
    """Return the options by which a slice of a stack computes what these blocks compute in the stack."""
    numbers = range(len(blocks))[index]
    coupled = [i for i, block in enumerate(blocks) if i >= options.ordinary and not is_invertible(block)]
    order, each = {i: number for number, i in enumerate(coupled)}, len(options.branches or (None,))
    steps = [order[i] * each + branch for i in numbers if i in order for branch in range(each)]

    def cut(cycled: Any) -> Any:
        return [cycled[n % len(cycled)] for n in steps] if is_list(cycled) and len(cycled) > 1 and steps else cycled

    changes: dict[str, Any] = {name: cut(getattr(options, name)) for name in CYCLED}
    treatments = resolved.treatments[index]
    if options.store_last or options.treatments:
        changes |= {"store_last": 0, "treatments": treatments}
    ordinary = sum(i < options.ordinary for i in numbers)
    budget = None if resolved.budget is None else Budget(resolved.budget.value)
    return (
        replace(options, ordinary=ordinary, **changes),
        Resolved(tuple(cut(resolved.couplings)), treatments, tuple(cut(resolved.chunks)), budget),
    )
