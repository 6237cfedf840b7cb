"""The steps of one call of a stack: for each block one, or one for each of its branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_revlib.nn.coupling.standard import Invertible
from lightning_revlib.nn.steps.branches import Branch
from lightning_revlib.nn.steps.chunks import ChunkedStep
from lightning_revlib.nn.steps.step import Call, Step

if TYPE_CHECKING:
    from lightning_revlib.nn.stacks.sequential import CoupledSequential


def build_steps(
    stack: CoupledSequential,
    dtype: torch.dtype,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    layerwise: Sequence[Call] | None,
) -> list[Step]:
    """All of a stack's, behind its ordinary blocks. Raises ValueError for too few or too many arguments by layer."""
    if layerwise is not None and len(layerwise) != len(stack):
        raise ValueError(
            f"layerwise has {len(layerwise)} entries; pass one (args, kwargs) for each of {len(stack)} blocks"
        )
    if len(stack.treatments) != len(stack):  # blocks were appended, or deleted
        if len(set(stack.treatments)) > 1:
            raise ValueError(
                f"{stack.path} has {len(stack)} blocks, and was made of {len(stack.treatments)} with treatments of"
                " their own; make it anew, or name all by lightning_revlib.swap(model, {path: {'treatments': [...]}})"
            )
        stack.treatments = stack.treatments[:1] * len(stack)
    steps: list[Step] = []
    call: Call = (args, kwargs)
    simple = not stack.branches and stack.chunks == (1,)
    couplings, treatments, ordinary, kind = stack.couplings, stack.treatments, stack.ordinary, stack._step
    blocks = 0
    for index, (name, module) in enumerate(stack._modules.items()):
        if index < ordinary:
            continue
        if layerwise is not None:
            call = call_of(index, args, kwargs, layerwise)
        if hasattr(type(module), "inverse") and is_invertible(module):
            steps.append(Step(stack, name, module, Invertible(module), dtype, call, treatments[index]))
        elif simple:  # as `steps_of` would, without a call and a list for each block of each forward
            steps.append(kind(stack, name, module, couplings[blocks % len(couplings)], dtype, call, treatments[index]))
            blocks += 1
        else:
            steps += steps_of(stack, index, blocks, name, module, dtype, call)
            blocks += len(stack.branches) or 1
    return steps


def steps_of(
    stack: Any, index: int, first: int, name: str, module: nn.Module, dtype: torch.dtype, call: Call
) -> list[Step]:
    """The step of a block, or one for each of its branches; `first` is its number, which gives it its coupling."""
    steps = []
    for number, spec in enumerate(stack.branches or [None], first):
        branch = None if spec is None else Branch(module, spec)
        coupling, chunks = stack.couplings[number % len(stack.couplings)], stack.chunks[number % len(stack.chunks)]
        key = name if branch is None else f"{name}.{branch.name}"
        kind = stack._step if chunks == 1 else ChunkedStep
        step = kind(stack, key, module, coupling, dtype, call, stack.treatments[index])
        if isinstance(step, ChunkedStep):
            step.count, step.dim = chunks, stack.chunk_dim
        if branch is not None:
            step.call = branch
        steps.append(step)
    return steps


def call_of(index: int, args: Sequence[Any], kwargs: Mapping[str, Any], layerwise: Sequence[Call] | None) -> Call:
    """The arguments of one block: the common ones and, after and above them, its own."""
    if layerwise is None:
        return args, kwargs
    return (*args, *layerwise[index][0]), {**kwargs, **layerwise[index][1]}


def is_invertible(module: nn.Module | None) -> bool:
    """Whether it is a step that is undone by its `inverse`; a stack's own is for users."""
    return hasattr(type(module), "inverse") and getattr(type(module), "_step", None) is not Step
