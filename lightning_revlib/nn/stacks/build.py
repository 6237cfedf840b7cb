"""The steps of one call of a stack: for each block one, or one for each of its branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_revlib.nn.coupling.invertible import Invertible
from lightning_revlib.nn.steps.branches import Branch
from lightning_revlib.nn.steps.chunks import ChunkedStep
from lightning_revlib.nn.steps.outputs import split_output
from lightning_revlib.nn.steps.step import Arguments, Step


def build_steps(stack: Any, dtype: torch.dtype, args: Any, kwargs: Any, layerwise: Any) -> list[Step]:
    """Return all steps of a stack, those after its ordinary blocks. Raises ValueError for wrong `layerwise`."""
    check_layerwise(layerwise, len(stack))
    stack.step_treatments()
    first, steps = 0, []
    for index, (name, module) in enumerate(stack._modules.items()):
        if index < stack.options.ordinary:
            continue
        arguments = arguments_of(index, args, kwargs, layerwise)
        if is_invertible(module):
            steps.append(Step(stack.path, name, module, Invertible(module), module, dtype, training=stack.training))
        else:
            steps += steps_of(stack, first, name, module, dtype, arguments)
            first += len(stack.options.branches or (None,))
    return steps


def steps_of(
    stack: Any,
    first: int,
    name: str,
    module: nn.Module,
    dtype: torch.dtype,
    arguments: Arguments,
    forward: Callable[..., Any] | None = None,
    split: Callable[[Any], tuple[Any, Any]] = split_output,
) -> list[Step]:
    """Return the step of a block, or one for each of its branches.

    `first` is the number of steps before it, by which couplings and chunks are cycled. `forward` is called instead of
    the block, `split` parts what it returns.
    """
    options, couplings, chunks = stack.options, stack.couplings, stack.chunks
    fields: dict[str, Any] = {"residual": options.residual, "training": stack.training, "split": split}
    steps: list[Step] = []
    for number, spec in enumerate(options.branches or (None,), first):
        branch = None if spec is None else Branch(module, spec)
        key = name if branch is None else f"{name}.{branch.name}"
        common = (stack.path, key, module, couplings[number % len(couplings)])
        call = branch or forward or module
        count = chunks[number % len(chunks)]
        if count == 1:
            steps.append(Step(*common, call, dtype, *arguments, **fields))
        else:
            steps.append(ChunkedStep(*common, call, dtype, *arguments, count=count, dim=options.chunk_dim, **fields))
    return steps


def arguments_of(
    index: int, args: Sequence[Any], kwargs: Mapping[str, Any], layerwise: Sequence[Arguments] | None
) -> Arguments:
    """Return the arguments of one block: the common ones and, after and above them, its own."""
    if layerwise is None:
        return args, kwargs
    return (*args, *layerwise[index][0]), {**kwargs, **layerwise[index][1]}


def check_layerwise(layerwise: Sequence[Arguments] | None, count: int) -> None:
    """Raise ValueError for too few or too many arguments by layer."""
    if layerwise is not None and len(layerwise) != count:
        raise ValueError(f"layerwise has {len(layerwise)} entries; pass one (args, kwargs) for each of {count} blocks")


def is_invertible(module: nn.Module | None) -> bool:
    """Return whether a block is an invertible step, undone by its `inverse`; that of a stack is for users."""
    return hasattr(type(module), "inverse") and not getattr(type(module), "is_stack", False)
