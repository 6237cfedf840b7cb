"""What a module's stacks compute, saved in its checkpoints as targets for `swap`, and compared when one is loaded.

The class in the checkpoint's code does not say it: a module that was trained with targets computes another function
without them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_revlib.nn import COUPLINGS, Coupling
from lightning_revlib.nn.convert.swap import STACKS, Targets
from lightning_revlib.nn.coupling.exact import BDIA, Exact
from lightning_revlib.nn.stacks.module_list import IteratedSequential
from lightning_revlib.nn.stacks.options import StackOptions
from lightning_revlib.strategies.setup import Budget, swap_module, targets_of

KEY = "reversible_targets"
OPTIONS = ("split_dim", "residual", "grid_bits", "ordinary")  # that change what a stack computes, besides two others


def save_targets(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Put what the module's stacks compute into a checkpoint, as plain data."""
    if found := describe_stacks(module):
        checkpoint[KEY] = found


def take_targets(module: nn.Module, saved: Mapping[str, Any], targets: Targets | None, budget: Budget | None) -> None:
    """Swap what a checkpoint's module had swapped, if nothing else is targeted, and warn of other differences."""
    own = describe_stacks(module)
    if targets_of(module, targets) is None:
        swap_module(module, {path: saved[path] for path in saved.keys() - own.keys()}, budget, strict=False)
    warn_of_differences(module, saved)


def warn_of_differences(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Warn if stacks compute something else than those of the module that was saved."""
    own, paths = describe_stacks(module), dict(module.named_modules())
    others = {path: options for path, options in saved.items() if path in paths and options != own.get(path)}
    if others:
        now = {path: own[path] for path in others if path in own} or "no such stacks"
        rank_zero_warn(
            f"the checkpoint's {type(module).__name__} was trained with {others}, this one has {now}, and computes"
            f" another function; lightning_revlib.swap(module, torch.load(path)[{KEY!r}]) makes it the same"
        )


def describe_stacks(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what each stack computes, by path, as targets of plain data."""
    return {path: _describe(m) for path, m in module.named_modules() if isinstance(m, STACKS)}


def _describe(stack: Any) -> dict[str, Any]:
    couplings = [_describe_coupling(coupling) for coupling in stack.couplings]
    options: dict[str, Any] = {"coupling": couplings[0] if len(couplings) == 1 else couplings}
    options |= {name: getattr(stack, name) for name in OPTIONS if getattr(stack, name) != getattr(StackOptions, name)}
    if stack.branches is not None:
        options["branches"] = [getattr(each, "__name__", None) or list(each) for each in stack.branches]
    return options | ({"iterated": True} if isinstance(stack, IteratedSequential) else {})


def _describe_coupling(coupling: Coupling) -> dict[str, Any]:
    """Return the mapping that stands for a coupling; of one that has no name, the name of its class."""
    if isinstance(coupling, Exact):
        coupling = coupling.inner
    elif isinstance(coupling, BDIA):
        coupling = dataclasses.replace(coupling, bits=None)  # these follow from grid_bits
    name = next((name for name, cls in COUPLINGS.items() if type(coupling) is cls), type(coupling).__qualname__)
    fields: dict[str, Any] = vars(coupling) if dataclasses.is_dataclass(coupling) else {}
    plain = {key: value for key, value in fields.items() if isinstance(value, (bool, int, float, str))}
    return {"name": name, **plain}
