"""What the stacks of a model compute, as targets of plain data: for checkpoints and configs of pretrained models."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_revlib.nn.coupling.base import Coupling
from lightning_revlib.nn.coupling.registry import COUPLINGS
from lightning_revlib.nn.stacks.module_list import IteratedSequential, Layerwise
from lightning_revlib.nn.stacks.options import StackOptions
from lightning_revlib.nn.stacks.sequential import CoupledSequential

KEY = "reversible_targets"
STACKS: tuple[Any, ...] = (CoupledSequential, Layerwise)
OPTIONS = ("split_dim", "residual", "grid_bits", "ordinary")  # which change the function, as coupling and branches do


def note_in_configs(model: nn.Module) -> None:
    """Write what its stacks compute into each config of a pretrained model of transformers; clear it if it has none."""
    for _, pretrained in _pretrained(model):
        if found := describe_stacks(pretrained):
            setattr(pretrained.config, KEY, found)
            for path, options in found.items():
                pretrained.get_submodule(path).keep_described(options)
        elif hasattr(pretrained.config, KEY):
            delattr(pretrained.config, KEY)


def noted_in_configs(model: nn.Module, *, strict: bool = True) -> dict[str, Any]:
    """Return the targets that `note_in_configs` has written, with their paths in `model`.

    A pretrained model was perhaps saved with another head, or with none. Raises ValueError for a path that it does not
    have in any case; without `strict`, it is left out. Parts of a pretrained model, such as T5's stacks, have perhaps
    copies of its config.
    """
    targets: dict[str, Any] = {}
    noted: list[str] = []  # of pretrained models
    for prefix, pretrained in _pretrained(model):
        paths, base = dict(pretrained.named_modules()), f"{pretrained.base_model_prefix}."
        is_part = any(not other or prefix.startswith(f"{other}.") for other in noted)
        for path, options in (getattr(pretrained.config, KEY, None) or {}).items():
            found = [each for each in (path, path.removeprefix(base), base + path) if each in paths]
            if found:
                targets[f"{prefix}.{found[0]}".lstrip(".")] = options
            elif strict and not is_part:
                raise ValueError(
                    f"the config of {type(pretrained).__name__} says that {path!r} was swapped, and the model has no"
                    f" such module; leave it out by strict=False, name another by targets, or del model.config.{KEY}"
                )
        noted += [prefix] if hasattr(pretrained.config, KEY) else []
    return targets


def _pretrained(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the path and the module of each pretrained model that has a config of its own."""
    seen = set()
    for path, m in model.named_modules():
        if hasattr(type(m), "config_class") and id(config := getattr(m, "config", None)) not in seen:
            seen.add(id(config))
            yield path, m


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
    """Return the mapping that stands for a coupling; of one that has no name, the name of its class.

    What is no plain data, such as a function, is there in `<>`, which `get_coupling` refuses.
    """
    coupling = getattr(coupling, "inner", coupling)  # of one on the grid
    name = next((name for name, cls in COUPLINGS.items() if type(coupling) is cls), type(coupling).__qualname__)
    own, known = vars(coupling), inspect.signature(type(coupling)).parameters
    given = {key: own[key] for key in known if own.get(key) is not None and key != "bits"}
    kept = {key: x for key, x in given.items() if isinstance(x, (bool, int, float, str)) or x is not known[key].default}
    return {"name": name, **{key: _plain(value) for key, value in kept.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    return f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"
