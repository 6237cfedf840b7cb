"""The functions that the strategies and `ReversibleCallback` share: swap a module, and keep its memory budget."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_revlib.nn import swap
from lightning_revlib.nn.convert.swap import Targets, find, stacks
from lightning_revlib.nn.plan.budget import LOSS, Budget, share_budget
from lightning_revlib.nn.plan.limit import BudgetError, MemoryBudget

__all__ = [
    "Budget",
    "MemoryBudget",
    "Targets",
    "TunerBudgetError",
    "check_arguments",
    "check_flag",
    "explain_memory",
    "make_budget",
    "read_targets",
    "refuse_overlap",
    "save_memory_plan",
    "swap_module",
    "swap_new",
    "take_memory_figures",
    "targets_of",
]


class TunerBudgetError(BudgetError, RuntimeError):
    """A budget is too small, with the words among its `args` by which Lightning's Tuner knows a batch as too large."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message} (DefaultCPUAllocator: can't allocate memory)")
        self.message = message

    def __str__(self) -> str:
        return self.message


def swap_module(
    module: nn.Module, targets: Targets | None, budget: Budget | None = None, *, strict: bool = True
) -> list[str]:
    """Swap the stacks of `module`, give all of them the budget, and return their paths.

    Without `targets`, the module's attribute or method `reversible_targets` names them. If not `strict`, finding none
    is no error.
    """
    paths = swap(module, targets_of(module, targets), strict=strict)
    if paths:
        share_budget(stacks(module), budget)
    return paths


def swap_new(module: nn.Module, targets: Targets | None, budget: Budget | None) -> None:
    """Swap the stacks that were assigned since `swap_module`; the others keep what callbacks have changed of them."""
    found = find(module, targets_of(module, targets), strict=False)
    if new := {path: options for path, m, options in found if path not in stacks(module)}:
        swap_module(module, new, budget)


def targets_of(module: nn.Module, targets: Targets | None) -> Targets | None:
    """Return the targets that are given, or else those of the module itself, or None."""
    if targets is None:
        targets = getattr(module, "reversible_targets", None)
        targets = read_targets(targets() if callable(targets) else targets)
    return targets


def refuse_overlap(module: nn.Module, name: str) -> None:
    """Raise ValueError if a stack runs blocks on another stream, on which their parameters are not gathered."""
    for path, stack in stacks(module).items():
        if stack.overlap:
            raise ValueError(
                f"{path}: overlap=True runs a block on a stream of its own, {name} gathers its parameters in others;"
                " leave it out, or take strategy='reversible', which keeps them in place"
            )


def make_budget(memory_budget: MemoryBudget | None) -> Budget | None:
    """Return the budget that stacks can share. Its plans are printed by the first process."""
    return None if memory_budget is None else Budget(memory_budget, announce=rank_zero_info)


def save_memory_plan(checkpoint: dict[str, Any], budget: Budget | None, module: nn.Module) -> None:
    """Put the plan of `budget` into a checkpoint, and the figures of all stacks from which plans follow.

    The plan is there to be read by people. `take_memory_figures` loads the figures.
    """
    if budget is not None and budget.plan is not None:
        checkpoint["memory_plan"] = asdict(budget.plan)
    figures: dict[str, Any] = {}
    for stack in stacks(module).values():
        if stack.budget is not None:
            figures.update(stack.budget.state_dict())
    if figures:
        checkpoint["memory_figures"] = figures


def take_memory_figures(module: nn.Module, figures: Mapping[str, Any]) -> None:
    """Load saved figures, so that a run that resumes follows the saved plans from its first step.

    The figures of a stack that has no budget any more are passed over.
    """
    for path, stack in stacks(module).items():
        if stack.budget is not None and path in figures:
            stack.budget.load_state_dict({each: figures[each] for each in (path, LOSS) if each in figures})


def read_targets(targets: Any) -> Targets | None:
    """Return targets as `swap` takes them. Raise TypeError if they are no mapping.

    Containers of Hydra become plain ones, which can be pickled and compared.
    """
    if (omegaconf := sys.modules.get("omegaconf")) is not None and omegaconf.OmegaConf.is_config(targets):
        targets = omegaconf.OmegaConf.to_container(targets, resolve=True)
    if targets is not None and not isinstance(targets, Mapping):
        raise TypeError(
            f"targets={targets!r}: pass a mapping from the path of a module to its options, such as"
            " {'net.blocks': {'coupling': 'additive'}}"
        )
    return targets


def check_arguments(owner: type, given: Mapping[str, Any], *accepting: Any) -> None:
    """Raise TypeError for an argument that none of the callables in `accepting` has.

    Lightning would pass it on and fail when several processes have started, or never.
    """
    known = {name for each in accepting for name in inspect.signature(each).parameters} - {"self", "kwargs", "module"}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
            raise TypeError(f"{owner.__name__} has no argument {name}={given[name]!r}; {hint}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError if it is not True or False, such as a text."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: pass True or False")


def explain_memory(exception: BaseException, module: nn.Module) -> None:
    """Append to an out-of-memory error the options that would still reduce memory; leave other errors as they are."""
    if not is_out_of_memory(exception) or isinstance(exception, BudgetError):
        return
    ways = []
    for path, stack in stacks(module).items():
        if stack.plan is None or stack.path not in stack.plan.treatments:  # the stack has not run yet
            treatments, units = stack.treatments, "blocks"
            way = "give them a smaller memory_budget or store_last, or treatments of 'reversible'"
        else:
            treatments, units = stack.plan.treatments[stack.path], "steps"
            way = "by their memory plan; take a smaller memory_budget"
        if kept := len(treatments) - treatments.count("reversible"):
            ways.append(f"{path}: {kept} of {len(treatments)} {units} keep activations: {way}")
    advice = "; ".join(ways) or (
        "all stacks hold their output only; a smaller batch or a shorter stack outside of them,"
        " accumulate_grad_batches or optimizer_in_backward=True remain"
    )
    text = f"{exception}\nreversible stacks: {advice}; revlib.report(model, batch) measures it"
    exception.args = (text, *exception.args[1:])


def is_out_of_memory(exception: BaseException) -> bool:
    """Return whether memory was exhausted; for memory of the host, torch raises a plain RuntimeError."""
    host = ("not enough memory", "can't allocate memory")
    return isinstance(exception, torch.OutOfMemoryError) or any(words in str(exception) for words in host)
