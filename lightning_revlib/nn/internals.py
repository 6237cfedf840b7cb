"""All private names of torch that the package uses, each with its reason and the public replacement to watch for.

No other module of the package reaches for one (tests/test_house.py holds it). If a name is missing in a release of
torch, the import fails here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.eval_frame import set_eval_frame, skip_code
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as outside_transforms
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# as they are: FakeTensorMode computes shapes without memory; set_eval_frame turns torch.compile off and on, for
# `nn.compilation`; the others but `outside_transforms` are used by many libraries; none has a public twin yet
__all__ = ["TorchDispatchMode", "pytree", "FakeTensorMode", "outside_transforms", "set_eval_frame"]


def never_compile(*functions: Callable[..., Any]) -> None:
    """Keep torch.compile away from functions that autograd calls while a compiled block runs.

    `torch.compiler.disable` does the same by a wrapper, which costs a context manager for each saved tensor.
    """
    for function in functions:
        skip_code(function.__code__)


def is_exporting() -> bool:
    """Return whether torch.export or torch.jit.trace records the call, to which stacks are ordinary ones.

    While torch.compile runs, `torch.compiler.is_exporting()` is True before torch 2.13 (pytorch#176347).
    """
    return getattr(torch.compiler, "_is_exporting_flag", False) or torch.jit.is_tracing()


def graph_task() -> int:
    """Return the number of the backward that runs in this thread, -1 if none does. No public twin."""
    return torch._C._current_graph_task_id()


def graph_is_kept() -> bool:
    """Return whether the backward that runs was called with `retain_graph`. No public twin."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def in_transform() -> bool:
    """Return whether a torch.func transform is active, which allows no saved-tensor hooks. Watch torch.func."""
    with outside_transforms() as transforms:
        return bool(transforms)


def surrounding_hooks() -> Any:
    """Return the innermost active saved-tensor hooks, as (pack, unpack), or None. Watch torch.autograd.graph."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def holders(tensor: Tensor) -> tuple[int, int]:
    """Return how many tensors share this tensor's storage, and how many owners it has itself, in C++ and Python.

    No public twin; without them `engine.release` could free nothing early.
    """
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata), tensor._use_count()  # type: ignore[attr-defined]


def function_modes() -> list[Any]:
    """Return the TorchFunctionModes that are active, outermost first. Watch torch.overrides."""
    return _get_current_function_mode_stack()


@contextmanager
def only_function_modes(modes: Sequence[Any]) -> Iterator[None]:
    """Have exactly these TorchFunctionModes active inside.

    Entering a mode again by `with` would run its own `__enter__`, which may keep count of it.
    """
    now = function_modes()
    _replace_modes(now, modes)
    try:
        yield
    finally:
        _replace_modes(modes, now)


def _replace_modes(old: Sequence[Any], new: Sequence[Any]) -> None:
    for mode in reversed(old):
        TorchFunctionMode.__exit__(mode, None, None, None)
    for mode in new:
        TorchFunctionMode.__enter__(mode)


def parametrization_cache() -> Any:
    """Return the weights that `parametrize.cached` has, by module and name; None outside of it. No public twin."""
    return torch.nn.utils.parametrize._cache if torch.nn.utils.parametrize._cache_enabled else None


@contextmanager
def use_parametrization_cache(cache: Any) -> Iterator[None]:
    """Have `parametrize.cached` begin with these weights inside; with None, have it off."""
    now = torch.nn.utils.parametrize._cache, torch.nn.utils.parametrize._cache_enabled
    torch.nn.utils.parametrize._cache = dict(cache or {})
    torch.nn.utils.parametrize._cache_enabled = int(cache is not None)
    try:
        yield
    finally:
        torch.nn.utils.parametrize._cache, torch.nn.utils.parametrize._cache_enabled = now


def fsdp_objects(modules: Sequence[Any]) -> list[Any]:
    """Return the objects in which FSDP2 keeps the shards of modules that `fully_shard` has sharded.

    Watch for a public way to the shards of an FSDPModule.
    """
    found: dict[int, Any] = {}
    waiting = [m._get_fsdp_state() for m in modules]
    while waiting:
        each = waiting.pop()
        if isinstance(each, (list, tuple)):
            waiting.extend(each)
        elif id(each) not in found and _is_of_fsdp(each):
            found[id(each)] = each
            waiting.extend(vars(each).values())
    return list(found.values())


def _is_of_fsdp(each: Any) -> bool:
    ours = type(each).__module__.startswith("torch.distributed.fsdp.") and hasattr(each, "__dict__")
    return ours and not isinstance(each, (torch.nn.Module, Enum, type))


@contextmanager
def fsdp_as_in_backward(modules: Sequence[Any]) -> Iterator[None]:
    """Have the hooks of modules that `fully_shard` has sharded act as in backward, where a block runs again.

    Watch FSDPModule's methods.
    """
    states = [m._get_fsdp_state() for m in modules]
    before = {state: (state._training_state, {*state._modules_to_run_forward}) for state in states}
    for state, (training_state, _) in before.items():
        state._training_state = type(training_state).PRE_BACKWARD
    try:
        yield
    finally:
        for state, (training_state, to_run) in before.items():
            state._training_state = training_state
            state._modules_to_run_forward.clear()
            state._modules_to_run_forward.update(to_run)
