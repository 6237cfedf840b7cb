"""Swapping: which modules of a model run reversibly. Classes change; objects, names and parameters stay.

swap(model)      every CoupledSequential -> ReversibleSequential
swap(model, {"encoder.layers": {"coupling": "momentum"}})    existing containers, by path or glob
restore(model)   back to the classes from before
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_revlib.nn.convert.describe import STACKS, note_in_configs, noted_in_configs
from lightning_revlib.nn.coupling.base import Coupling
from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.stacks.module_list import IteratedSequential, Layerwise, ReversibleModuleList, proxy_of
from lightning_revlib.nn.stacks.options import StackOptions
from lightning_revlib.nn.stacks.reversible import Reversible
from lightning_revlib.nn.stacks.sequential import CoupledSequential, ReversibleSequential
from lightning_revlib.nn.stacks.stack import Stack
from lightning_revlib.nn.state.preserve import preserve_state

CONTAINERS = (nn.Sequential, nn.ModuleList)
REVERSIBLE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Sequential: ReversibleSequential,
    nn.ModuleList: ReversibleModuleList,
    CoupledSequential: ReversibleSequential,
}
Targets: TypeAlias = Mapping[str, Mapping[str, Any] | str | Coupling | None]
Match: TypeAlias = tuple[str, nn.Module, Mapping[str, Any] | None]
Record: TypeAlias = tuple[nn.Module, type[nn.Module], dict[str, Any]]


def swap(model: nn.Module, targets: Targets | None = None, *, strict: bool = True, inputs: Any = None) -> list[str]:
    """Make stacks of `model` reversible, in place, and return their paths.

    >>> swap(model)                                                     # every CoupledSequential
    >>> swap(model, {"net.blocks": {"coupling": "additive", "split_dim": 1}})

    Objects, children's names, parameters and their order stay, so that optimizers, checkpoints and averages made before
    the swap remain valid. The paths include stacks that are reversible already. A stack keeps the options that are not
    given, and the grid that it has chosen; another container becomes a stack with the given ones.

    Args:
        model: any module; the path "" is the model itself.
        targets: paths, or globs over ``named_modules()`` ("layers.*"), to options of
            `CoupledSequential`, to a coupling alone, or to None for no options. Without targets, every
            CoupledSequential, or the targets in the config of a saved pretrained model. ``iterated=True`` is for an
            nn.Sequential whose blocks the model calls one by one.
        strict: if True, a target that matches nothing is an error; if False, it is ignored.
        inputs: inputs of the model, to try the swap with: a mapping for arguments by name, a tuple for more than one.
            What cannot run forward and backward reversibly is then an error at once; without inputs, in the first run.

    If anything is raised, `model` is left as it was.

    Raises:
        ValueError: for a target that matches nothing, an invalid option, or nothing to swap at all.
        TypeError: for a target that is no container of blocks.
        ValueError, TypeError, RuntimeError: with `inputs`, for blocks that change the shape, and layers called
            out of order, twice, or with something else than the previous layer returned.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: pass an nn.Module, an object and no class")
    found = find(model, targets, strict=strict)
    if strict and not found:
        why = f"{type(model).__name__} has no CoupledSequential" if targets is None else f"targets={targets} is empty"
        raise ValueError(
            f"nothing to swap: {why}; build its stack from a CoupledSequential, or name an nn.Sequential or"
            " nn.ModuleList by targets: print(lightning_revlib.report(model, batch)) proposes them"
        )
    before = record(module for _, module, _ in found)
    try:
        for path, module, options in found:
            swap_one(path, module, options)
        if inputs is not None:
            _try(model, inputs)
    except Exception:
        put_back(before)
        raise
    note_in_configs(model)
    return [path for path, _, _ in found]


def _try(model: nn.Module, inputs: Any) -> None:
    """Run the model forward and backward, and leave it as it was."""
    positional = inputs if isinstance(inputs, tuple) else (inputs,)
    with preserve_state(model), torch.enable_grad():
        out = model(**inputs) if isinstance(inputs, Mapping) else model(*positional)
        outputs = [y for y in pytree.tree_leaves(out) if isinstance(y, Tensor) and y.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])


@contextmanager
def preserve_stacks(containers: Iterable[nn.Module]) -> Iterator[None]:
    """Put back at the end what swaps and forwards change of containers.

    Inside, their drift is measured anew, and the config of a pretrained model is not told of them.
    """
    before = record(containers)
    for module, _, _ in before:
        for name in ("_history", "noted") if isinstance(module, Stack) else ():
            vars(module).pop(name, None)
    try:
        yield
    finally:
        put_back(before)


def record(containers: Iterable[nn.Module]) -> list[Record]:
    """Return all that swapping changes of containers and their layers, for `put_back`."""
    modules = [m for container in containers for m in (container, *container.children())]
    return [(m, m.__class__, dict(vars(m))) for m in modules]


def put_back(records: list[Record]) -> None:
    """Restore modules to what `record` returned of them."""
    for module, cls, attributes in records:
        module.__class__ = cls
        module.__dict__.clear()
        module.__dict__.update(attributes)


def restore(model: nn.Module) -> list[str]:
    """Undo `swap` and return the restored paths. State-dict keys and parameters stay the same.

    Layers that were cut off a swapped list are released, and their own paths returned, unless the list is in the model.
    A ReversibleSequential that was not made by a swap becomes a CoupledSequential, which is the same function. A
    ReversibleModuleList that was not made by a swap stores the activations of all its layers.
    """
    restored = stacks(model)
    for module in restored.values():
        if isinstance(module, Layerwise):
            if "_swapped_from" not in vars(module):
                module.treatments = ("store",) * len(module)
                continue
            module.release()
        own = vars(module)
        module.__class__, attributes = own.pop("_swapped_from", (CoupledSequential, _options_of(module)))
        for name in ("options", "resolved", "path", "_history", "_forwards", "noted", "grid_is_chosen"):
            own.pop(name, None)
        own.update(attributes)
    for path, m in model.named_modules():  # the rest of a list, as after model.layers = model.layers[:2]
        if (proxy := proxy_of(m)) and proxy.owner not in restored.values():
            proxy.release()
            restored[path] = m
    note_in_configs(model)
    return list(restored)


def stacks(model: nn.Module) -> dict[str, Any]:
    """Return the reversible stacks of a model by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Reversible)}


def find(model: nn.Module, targets: Targets | None = None, *, strict: bool = True) -> list[Match]:
    """Return what `swap` would swap: the path, the module and the options of each stack."""
    if targets is not None and not isinstance(targets, Mapping):
        raise TypeError(
            f"targets={targets!r}: pass a mapping of paths, such as {{'layers': {{'coupling': 'midpoint'}}}}"
        )
    modules = dict(model.named_modules())
    found: dict[str, Mapping[str, Any] | None] = {}
    if targets is None:
        found.update((path, None) for path, m in modules.items() if isinstance(m, STACKS))
        found = found or noted_in_configs(model, strict=strict)
    for target, options in (targets or {}).items():
        paths = _paths_of(model, target)
        if strict and not paths:
            raise _no_match(model, target)
        found.update(dict.fromkeys(paths, _read_options(target, options)))
    return [(path, modules[path], options) for path, options in found.items()]


def _no_match(model: nn.Module, target: str) -> ValueError:
    containers = [path for path, m in model.named_modules() if _is_swappable(m)]
    near = difflib.get_close_matches(target, containers, cutoff=0.4) or containers[:5]
    hint = f"near it: {', '.join(map(repr, near))}" if near else "and has none at all"
    return ValueError(f"target {target!r} matches no nn.Sequential or nn.ModuleList of {type(model).__name__}; {hint}")


def _read_options(target: str, options: Any) -> Mapping[str, Any] | None:
    """Return a target's options, of which a coupling may stand for all. Raises TypeError."""
    if isinstance(options, (str, Coupling)):
        return {"coupling": options}
    if options is None or isinstance(options, Mapping):
        return options
    raise TypeError(
        f"target {target!r}: {options!r} are no options; pass a mapping such as {{'coupling': 'additive'}}, a coupling,"
        " or None"
    )


def _paths_of(model: nn.Module, target: str) -> list[str]:
    """Return the paths in `named_modules()` of the module that a target names, or of those that a glob matches."""
    try:
        named = model.get_submodule(target)  # which may have another path there, if it is shared
    except AttributeError:
        return [path for path, m in model.named_modules() if fnmatch.fnmatchcase(path, target) and _is_swappable(m)]
    return [path for path, m in model.named_modules() if m is named]


def _is_swappable(module: nn.Module) -> bool:
    return type(module) in REVERSIBLE or isinstance(module, Reversible)


def _options_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes by which a stack keeps its options; none for other containers."""
    return {name: value for name, value in vars(module).items() if name in ("options", "resolved")}


def swap_one(path: str, module: Any, options: Mapping[str, Any] | None) -> None:
    """Make one of the stacks that `find` has found reversible. Raises TypeError or ValueError."""
    original = type(module)
    if not _is_swappable(module):
        raise TypeError(
            f"target {path!r} is a {original.__name__}, which cannot be swapped, since its forward may do anything; a"
            " target is an nn.Sequential, an nn.ModuleList or a CoupledSequential itself"
        )
    changes = dict(options or {})
    reversible = REVERSIBLE.get(original, original)
    if original in (nn.Sequential, IteratedSequential) and changes.pop("iterated", False):
        reversible = IteratedSequential
    if original is not reversible:
        swapped_from = original, _options_of(module)
        module.__class__ = reversible
        module._swapped_from = swapped_from
    module.path = path or module.path
    if options is not None or original in CONTAINERS:
        _set_options(path, module, changes)


def _set_options(path: str, stack: Reversible, changes: Mapping[str, Any]) -> None:
    """Replace options of a stack. Raises TypeError or ValueError, with the stack as it was."""
    known = inspect.signature(StackOptions).parameters
    if unknown := [name for name in changes if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(known)}"
        raise TypeError(f"target {path!r}: there is no option {unknown[0]!r}; {hint}")
    before = vars(stack).get("options")
    try:
        default = StackOptions(split_dim=None) if isinstance(stack, Layerwise) else StackOptions()
        merged = (before or default).merged(changes)
        if before is not None and merged.grid_bits == "auto" and stack.grid_is_chosen:
            chosen = merged.merged({"grid_bits": before.grid_bits})
            merged = chosen if chosen.couplings() == before.couplings() else merged
        budget = stack.budget if merged == before else None  # the costs that it knows are still right
        stack.set_options(merged)
        if stack.grid_is_chosen and (before is None or merged.grid_bits != before.grid_bits):
            stack.grid_is_chosen = False
        if budget is not None:
            stack.budget = budget
    except (TypeError, ValueError) as error:
        raise type(error)(f"target {path!r}: {error}") from None
