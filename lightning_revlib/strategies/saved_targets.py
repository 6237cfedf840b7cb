"""What a module's stacks compute, saved in its checkpoints as targets for `swap`, and compared when one is loaded.

A module that was trained with targets computes another function without them, and neither its class nor its state dict
tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_revlib.nn.convert.describe import describe_stacks
from lightning_revlib.nn.convert.swap import Targets, stacks
from lightning_revlib.strategies.setup import Budget, swap_module, targets_of

KEY = "reversible_targets"


def save_targets(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Put what the module's stacks compute into a checkpoint, as plain data."""
    if found := describe_stacks(module):
        checkpoint[KEY] = found


def take_targets(module: nn.Module, saved: Mapping[str, Any], targets: Targets | None, budget: Budget | None) -> None:
    """Swap as a checkpoint's module was swapped, if `module` has no targets of its own; warn if they still differ."""
    take_grids(module, saved)
    if targets_of(module, targets) is None:
        others = saved.keys() - describe_stacks(module).keys()
        swap_module(module, {path: saved[path] for path in others}, budget, strict=False)
    warn_of_differences(module, saved)


def take_grids(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Give stacks with grid_bits="auto" the grid that the saved run has chosen."""
    for path, stack in stacks(module).items():
        if stack.grid_bits == "auto" and isinstance(bits := saved.get(path, {}).get("grid_bits"), int):
            stack.take_grid(bits)


def warn_of_differences(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Warn if stacks compute something else than those of the module that was saved."""
    own, paths = describe_stacks(module), dict(module.named_modules())
    others = {path: options for path, options in saved.items() if path in paths and not _agree(options, own.get(path))}
    if others:
        now = {path: own[path] for path in others if path in own} or "no such stacks"
        rank_zero_warn(
            f"the checkpoint's {type(module).__name__} was trained with {others}, this one has {now}, and computes"
            f" another function; lightning_revlib.swap(module, torch.load(path)[{KEY!r}]) makes it the same"
        )


def _agree(saved: Any, own: Any) -> bool:
    """Return whether options are the same, but for what versions up to 0.2 did not save of couplings."""
    if isinstance(saved, dict) and isinstance(own, dict) and "name" in saved:
        return all(key in own and own[key] == value for key, value in saved.items())
    if isinstance(saved, dict) and isinstance(own, dict):
        return saved.keys() == own.keys() and all(_agree(saved[key], own[key]) for key in saved)
    if isinstance(saved, list) and isinstance(own, list) and len(saved) == len(own):
        return all(map(_agree, saved, own))
    return bool(saved == own)
