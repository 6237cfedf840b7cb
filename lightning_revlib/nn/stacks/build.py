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


def arguments_of_blocks(
    stack: Any, args: Sequence[Any], kwargs: Mapping[str, Any], layerwise: Sequence[Arguments] | None
) -> list[Arguments]:
    """Return each block's arguments: the common ones and, after and above them, its own. Raises ValueError."""
    if layerwise is None:
        return [(args, kwargs)] * len(stack)
    if len(layerwise) != len(stack):
        raise ValueError(
            f"layerwise has {len(layerwise)} entries; pass one (args, kwargs) for each of {len(stack)} blocks"
        )
    for number, (name, module) in enumerate(stack._modules.items()):
        if number >= stack.options.ordinary and is_invertible(module) and any(layerwise[number]):
            raise ValueError(
                f"layerwise[{number}]: {stack.path}.{name} ({type(module).__name__}) is an invertible step, which gets"
                " a stream and nothing else; pass ((), {})"
            )
    return [((*args, *own), {**kwargs, **named}) for own, named in layerwise]


def build_steps(stack: Any, dtype: torch.dtype, arguments: Sequence[Arguments]) -> list[Step]:
    """Return all steps of a stack, those after its ordinary blocks, given the arguments of each block."""
    stack.step_treatments()
    coupled, steps = 0, []
    blocks = list(zip(stack._modules.items(), arguments, strict=True))
    for (name, module), given in blocks[stack.options.ordinary :]:
        if is_invertible(module):
            steps.append(Step(stack.path, name, module, Invertible(module), module, dtype, training=stack.training))
        else:
            steps += steps_of(stack, coupled, name, module, dtype, given)
            coupled += 1
    return steps


def steps_of(
    stack: Any,
    number: int,
    name: str,
    module: nn.Module,
    dtype: torch.dtype,
    arguments: Arguments,
    forward: Callable[..., Any] | None = None,
    split: Callable[[Any], tuple[Any, Any]] = split_output,
) -> list[Step]:
    """Return the step of a block, or one for each of its branches.

    `number` counts the stack's blocks that have a coupling. `forward` is called instead of the block, `split` parts
    what it returns.
    """
    options, resolved = stack.options, stack.resolved
    branches = options.branches or (None,)
    watch = stack.note_largest if options.grid_bits == "auto" else None
    shared = dtype, *arguments, options.residual, stack.training, split, watch
    steps = []
    for index, spec in enumerate(branches, number * len(branches)):
        key, call = name, forward or module
        if spec is not None:
            call = Branch(module, spec)
            key = f"{name}.{call.name}"
        coupling = resolved.couplings[index % len(resolved.couplings)]
        fields = stack.path, key, module, coupling, call, *shared
        chunks = resolved.chunks[index % len(resolved.chunks)]
        steps.append(Step(*fields) if chunks == 1 else ChunkedStep(*fields, count=chunks, dim=options.chunk_dim))
    return steps


def is_invertible(module: nn.Module | None) -> bool:
    """Return whether a block is an invertible step, undone by its `inverse`; that of a stack is for users."""
    return hasattr(type(module), "inverse") and not getattr(type(module), "is_stack", False)
