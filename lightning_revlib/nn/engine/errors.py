"""Errors of the engine: what happened, in which block, and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level

from lightning_revlib.nn.state.base import StateError
from lightning_revlib.nn.steps.step import Step


def output_freed() -> RuntimeError:
    return RuntimeError(
        "backward through a reversible stack a second time, after its output has been freed; pass retain_graph=True to"
        " the first backward, or differentiate the sum of both losses, also if one of them reads detached features"
    )


def output_modified() -> RuntimeError:
    return RuntimeError(
        "the output of a reversible stack has been modified by an inplace operation, and backward has to"
        " begin with it; use the operation that is not in-place on it, such as y = y + 1 for y += 1"
    )


def input_modified(step: Step) -> RuntimeError:
    return RuntimeError(
        f"the input of {step.name} has been modified by an inplace operation since forward, and"
        " backward has to run the block on it again; use the operation that is not in-place"
    )


def of_state(step: Step, error: StateError) -> RuntimeError:
    return RuntimeError(f"{step.name}: {error}")


def graph_freed() -> RuntimeError:
    return RuntimeError(
        "backward reached the graph of a block's second run, which is freed: it goes through what the block, or a"
        " forward hook in it, has put into a list, dict or object when backward ran it again; return it beside the"
        " branch, keep it as an attribute that each call sets anew, or clear a hook's list before each forward"
    )


def saved_modified(name: str, shape: Sequence[int]) -> RuntimeError:
    return RuntimeError(
        f"{name}: a tensor of shape {list(shape)} needed for its gradient has been"
        " modified by an inplace operation inside the block; use the operation that is not in-place"
    )


def kept_modified(step: Step, shape: Sequence[int]) -> RuntimeError:
    return RuntimeError(
        f"{step.name}: a tensor of shape {list(shape)} needed for its gradient has been modified in place since a first"
        " backward with create_graph=True; modify it, or step the optimizer, after the last backward"
    )


def draws_in_batched_gradients(step: Step) -> RuntimeError:
    return RuntimeError(
        f"{step.name} draws random numbers, and torch lets no block draw while is_grads_batched (vectorize=True in"
        " torch.autograd.functional) differentiates; use torch.func.vmap on torch.autograd.grad, or treatment 'store'"
    )


def inverse_modifies(step: Step, coupling: Any) -> RuntimeError:
    return RuntimeError(
        f"{step.name}: the inverse of its coupling, {coupling}, changes a stream in place, which"
        " the next block may still need; use the operation that is not in-place, such as out - f"
    )


def computes_otherwise(
    step: Step, sizes: Sequence[int], recomputed: Sequence[Tensor], now: Sequence[int], is_rebuilt: bool
) -> RuntimeError:
    """Return an error that compares the bytes of what a block has saved with what it saves when it runs again.

    `is_rebuilt` says that the second run's input was computed by the inverse of the step's coupling.
    """
    if _is_forward_mode():
        return RuntimeError(
            f"{step.name}: backward in forward-mode AD needs tangents, which no second run of a block finds; take"
            " treatment 'store' for all blocks, or differentiate twice in reverse, by create_graph=True"
        )
    pairs = [(n, *pair) for n, pair in enumerate(zip(sizes, recomputed, now, strict=False)) if pair[0] != pair[2]]
    lines = [
        f"{step.name} computes something else in backward than it did in forward: it saved"
        f" {len(sizes)} tensors for its gradient, and {len(recomputed)} when recomputed.",
        *[f"  {n}: saved {size:,} bytes, recomputed {_show(t)}, {count:,}" for n, size, t, count in pairs[:3]],
        "A block must depend on its input, arguments, parameters, registered buffers and torch's generators only."
        " Hooks, and lists such as that of PEFT's active adapters, must stay as they are until backward has ended.",
    ]
    if is_rebuilt and step.coupling.growth:
        lines.append(
            "Its input is rebuilt up to rounding: if shapes follow from a near tie, as in a router, take the stack's"
            " option grid_bits='auto', to rebuild it exactly, or treatment 'checkpoint' for this block."
        )
    if any(getattr(m, "grid_is_chosen", False) for m in step.module.modules()):
        lines.append("A stack in it has chosen its grid in between: give it grid_bits as a number in place of 'auto'.")
    if any(isinstance(m, torch.jit.ScriptModule) for m in step.module.modules()):
        lines.append("A scripted block is compiled after its first call with gradients; make one, as block(x).")
    return RuntimeError("\n".join(lines))


def _is_forward_mode() -> bool:
    """Return whether forward-mode AD runs: its levels cannot be nested."""
    try:
        with dual_level():
            return False
    except RuntimeError:
        return True


def _show(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
