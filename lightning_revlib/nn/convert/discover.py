"""Containers of a model that could be swapped, and why others could not, found by watching one forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_revlib.nn.compilation import EagerMode
from lightning_revlib.nn.convert.swap import CONTAINERS, find
from lightning_revlib.nn.coupling.standard import Momentum
from lightning_revlib.nn.engine.drift import expected_drift
from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.stacks.list_forward import same_memory
from lightning_revlib.nn.steps.outputs import split_output

TOLERANCE = 1e-3
GAMMAS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
GRID: dict[str, Any] = {"grid_bits": "auto"}
EXACT = {"coupling": {"name": "momentum", "gamma": 2.0**-4}, **GRID}


class Discovery(NamedTuple):
    """What `discover` has found, by path.

    `targets` are options for `swap`. `branches` are those in which the parts of a block are called: each begins with a
    part that is not called with what the part before returned. `others` say why the rest cannot be swapped. `routers`
    are those with blocks in which shapes depend on values.
    """

    targets: dict[str, dict[str, Any]]
    branches: dict[str, list[list[str]]]
    others: dict[str, str]
    routers: list[str]


def discover(model: nn.Module, run: Callable[[], Any]) -> Discovery:
    """Watch `run()`, a forward of the model, and return what could be swapped.

    A residual network's function is least changed by momentum with a small gamma. The smallest is taken whose expected
    drift in float32 stays below `TOLERANCE`; for blocks in which shapes depend on values, as in those with a router,
    an exact one, since a value that is rebuilt up to rounding may be sent elsewhere.
    """
    found = Discovery({}, {}, {}, [])
    for path, each in _watch(model, run).items():
        if _is_within(path, found.targets):
            continue  # a part of a block
        if reason := each.reason_against():
            found.others[path] = reason
        elif any(p.requires_grad for p in each.container.parameters()):
            found.targets[path] = each.options()
            if each.has_router():
                found.routers.append(path)
            if len(each.branches) > 1:
                found.branches[path] = each.branches
    return found


def discover_routers(model: nn.Module, run: Callable[[], Any]) -> Discovery:
    """Watch `run()`, and return the grid as an option for stacks in which shapes depend on values, if there are any.

    Other stacks are targets without options. A stack that is on a grid, or whose coupling cannot be, keeps its options.
    """
    found = Discovery({}, {}, {}, [])
    for path, each in _watch(model, run).items():
        options = getattr(each.container, "options", None)
        if options is not None and options.grid_bits is None and each.has_router():
            with suppress(ValueError):  # affine, say, cannot be exact
                options.merged(GRID)
                found.routers.append(path)
    if found.routers:
        found.targets.update({path: GRID if path in found.routers else {} for path, _, _ in find(model)})
    return found


def _watch(model: nn.Module, run: Callable[[], Any]) -> dict[str, _Watched]:
    """Return the containers of a model, by path, after `run()`."""
    shapes = _DynamicShapes()
    containers = {path: m for path, m in model.named_modules() if isinstance(m, CONTAINERS) and len(m) > 1}
    full = {path: m for path, m in containers.items() if None not in m._modules.values()}
    watched = {path: _Watched(path, m, shapes) for path, m in full.items()}
    with ExitStack() as hooks, torch.no_grad(), shapes:
        for each in watched.values():
            each.watch(hooks)
        run()
    return watched


def _is_within(path: str, others: Iterable[str]) -> bool:
    return any(path.startswith(f"{above}.") or not above for above in others)


def with_larger_gamma(options: Any) -> dict[str, Any] | None:
    """Return the options with the next larger gamma, for blocks that amplify errors; None if there is none."""
    larger = [gamma for gamma in GAMMAS if gamma > options["coupling"]["gamma"]]
    return {**options, "coupling": {"name": "momentum", "gamma": larger[0]}} if larger else None


class _Call(NamedTuple):
    """A call of a container's block."""

    block: int  # its index
    before: Any  # the shape of its first input
    after: Any  # the shape of its first output
    is_chained: bool  # its first input is the first output of the call before
    dynamic_shapes: int  # that the model had computed by its end


class _DynamicShapes(EagerMode):
    """Counts the operations whose output has a shape that depends on values."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_dynamic = torch.Tag.dynamic_output_shape in getattr(func, "tags", ())
        if is_dynamic and func is torch.ops.aten.index.Tensor:  # by numbers, or by a mask
            is_dynamic = any(isinstance(i, Tensor) and i.dtype is torch.bool for i in pytree.tree_leaves(args[1]))
        self.count += is_dynamic
        return func(*args, **(kwargs or {}))


@dataclass
class _Watched:
    """A container and what one forward does with it."""

    path: str
    container: Any
    shapes: _DynamicShapes
    calls: list[_Call] = field(default_factory=list)
    is_called: bool = False  # by the model, as a whole
    last: Any = None  # first output of the last call
    branches: list[list[str]] = field(default_factory=list)  # of the last block
    last_part: Any = None  # first output of the last call of one of its parts

    def watch(self, hooks: ExitStack) -> None:
        """Add hooks to the container, its blocks, and the parts of the last one."""
        hooks.callback(self.container.register_forward_hook(self._on_container).remove)
        for name, part in self.container[-1].named_children():
            hooks.callback(part.register_forward_hook(partial(self._on_part, name), with_kwargs=True).remove)
        for index, block in enumerate(self.container):
            hook = block.register_forward_hook(partial(self._on_block, index), with_kwargs=True)
            hooks.callback(hook.remove)

    def reason_against(self) -> str | None:
        """Return why the container cannot be swapped; None if it can."""
        if type(self.container) not in CONTAINERS:
            return f"it is a {type(self.container).__name__}, whose own forward may do anything"
        return self._wrong_calls() or self._wrong_blocks()

    def options(self) -> dict[str, Any]:
        """Return the options to swap the container with."""
        ordinary = self._count_ordinary()
        steps = len(self.container) - ordinary
        gamma = next((g for g in GAMMAS if expected_drift(Momentum(g), steps, torch.float32) < TOLERANCE), GAMMAS[-1])
        options: dict[str, Any] = EXACT if self.has_router() else {"coupling": {"name": "momentum", "gamma": gamma}}
        options = {**options, "residual": True}
        if isinstance(self.container, nn.Sequential):
            options |= {"split_dim": None} if self.is_called else {"iterated": True}
        return options | ({"ordinary": ordinary} if ordinary else {})

    def has_router(self) -> bool:
        """Return whether shapes depend on values in the blocks."""
        return bool(self.calls) and self.calls[-1].dynamic_shapes > self.calls[0].dynamic_shapes

    def _wrong_calls(self) -> str | None:
        """Return what is wrong with the order of the calls, or with their inputs."""
        order, passes = [call.block for call in self.calls], len(self.calls) // len(self.container)
        if not order:
            return "its blocks are not called with these inputs, or by their method forward alone"
        if order == list(range(len(self.container))) * passes:
            return self._broken_chain()
        if repeated := [i for i in sorted(order) if order.count(i) > 1]:
            return f"{self._name(repeated[0])} is called {order.count(repeated[0])} times in a forward"
        return f"its blocks are called in the order {', '.join(map(str, order))}"

    def _broken_chain(self) -> str | None:
        """Return which block is not called with what the one before it has returned."""
        for call in self.calls:
            if call.block and not call.is_chained:
                name, before = self._name(call.block), self._name(call.block - 1)
                return f"{name} is not called with what {before} returns: the model does something in between"
        return None

    def _wrong_blocks(self) -> str | None:
        """Return what is wrong with the blocks' types, or with their outputs' shapes."""
        if len(self.container) - self._count_ordinary() >= 2:
            return None
        kinds = list(dict.fromkeys(type(block).__name__ for block in self.container))
        if len(kinds) > 1:
            return f"its blocks are of different kinds: {', '.join(kinds)}"
        i, before, after, *_ = [call for call in self.calls if call.before != call.after][-1]
        return f"{self._name(i)} ({kinds[0]}) changes the shape from {before} to {after}"

    def _count_ordinary(self) -> int:
        """Return the number of blocks before the last ones that keep the shape and are of one type, or take turns."""
        kinds = Counter(type(block) for block in self.container if any(block.children()))
        turns = {kind for kind, count in kinds.items() if count > 1}  # as attention and Mamba in a hybrid model
        kind = type(self.container[-1])
        alike = turns if kind in turns else {kind}
        fits = [
            type(self.container[c.block]) in alike and c.before == c.after
            for c in reversed(self.calls[-len(self.container) :])
        ]
        return len(fits) - len(list(takewhile(bool, fits)))

    def _name(self, index: int) -> str:
        return f"{self.path}.{index}" if self.path else str(index)

    def _on_block(self, block: int, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        y = out if isinstance(out, Tensor) else split_output(out)[0]
        is_stream = isinstance(x, Tensor) and isinstance(self.last, Tensor) and same_memory(x, self.last)
        is_chained = not self.calls or is_stream
        self.calls.append(_Call(block, _shape(x), _shape(y), is_chained, self.shapes.count))
        self.last = y

    def _on_part(self, name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if isinstance(self.last_part, Tensor) and any(same_memory(x, self.last_part) for x in given):
            self.branches[-1].append(name)
        else:
            self.branches.append([name])
        self.last_part = out if isinstance(out, Tensor) else split_output(out)[0]

    def _on_container(self, *args: Any) -> None:
        self.is_called = True


def _shape(x: Any) -> Any:
    return list(x.shape) if isinstance(x, Tensor) else type(x).__name__
