"""Which containers of a model could be swapped, and why others could not: learnt by watching one forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revlib.nn.convert.swap import PLAIN
from lightning_revlib.nn.coupling.standard import Momentum
from lightning_revlib.nn.engine.drift import expected_drift
from lightning_revlib.nn.stacks.list_forward import same_memory
from lightning_revlib.nn.steps.outputs import split_output

TOLERANCE = 1e-3
GAMMAS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Survey:
    targets: dict[str, dict[str, Any]]  # path -> options, for `swap`
    others: dict[str, str]  # path -> why not


@dataclass
class _Seen:
    """What was seen of a container's children: one entry a call."""

    calls: list[int] = field(default_factory=list)
    shapes: list[tuple[Any, Any]] = field(default_factory=list)
    chained: list[bool] = field(default_factory=list)
    whole: int = 0  # calls of the container itself
    last: Any = None


def survey(model: nn.Module, run: Callable[[], Any]) -> Survey:
    """Watch `run()`, a forward of the model, and propose options for the containers that a swap fits.

    A residual network's function is least changed by momentum with a small gamma: the smallest is
    taken whose expected drift in float32 stays below `TOLERANCE`.
    """
    containers = {path: m for path, m in model.named_modules() if isinstance(m, PLAIN) and len(m) > 1}
    seen = {path: _Seen() for path in containers}
    with ExitStack() as stack, torch.no_grad():
        for path, container in containers.items():
            stack.callback(container.register_forward_hook(partial(_count, seen[path])).remove)
            for index, child in enumerate(container):
                hook = child.register_forward_hook(partial(_watch, seen[path], index), with_kwargs=True)
                stack.callback(hook.remove)
        run()
    targets: dict[str, dict[str, Any]] = {}
    others: dict[str, str] = {}
    for path, container in containers.items():
        if any(path.startswith(f"{above}.") or not above for above in targets):
            continue  # a part of a block
        ordinary, reason = _judge(path, container, seen[path])
        if reason:
            others[path] = reason
        elif any(p.requires_grad for p in container.parameters()):
            steps = len(container) - ordinary
            gamma = next((g for g in GAMMAS if expected_drift(Momentum(g), steps, torch.float32) < TOLERANCE), 0.99)
            options: dict[str, Any] = {"coupling": {"name": "momentum", "gamma": gamma}, "residual": True}
            if isinstance(container, nn.Sequential):
                options |= {"split_dim": None} if seen[path].whole else {"iterated": True}
            if ordinary:
                options["ordinary"] = ordinary
            targets[path] = options
    return Survey(targets, others)


def steadier(options: Any) -> dict[str, Any] | None:
    """The options with the next larger gamma, for blocks that amplify errors; None if there is none."""
    larger = [gamma for gamma in GAMMAS if gamma > options["coupling"]["gamma"]]
    return {**options, "coupling": {"name": "momentum", "gamma": larger[0]}} if larger else None


def _watch(seen: _Seen, index: int, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
    x = args[0] if args else next(iter(kwargs.values()), None)
    y = out if isinstance(out, Tensor) else split_output(out)[0]
    seen.chained.append(not seen.calls or (isinstance(x, Tensor) and same_memory(x, seen.last)))
    seen.calls.append(index)
    seen.shapes.append((_shape(x), _shape(y)))
    seen.last = y


def _count(seen: _Seen, *args: Any) -> None:
    seen.whole += 1


def _judge(path: str, container: nn.Module, seen: _Seen) -> tuple[int, str]:
    """How many first blocks must stay ordinary, and why the container cannot be swapped, or "" if it can."""
    blocks = list(container.children())
    names = [f"{path}.{i}" if path else str(i) for i in range(len(container))]  # type: ignore[arg-type]
    if type(container) not in PLAIN:
        return 0, f"it is a {type(container).__name__}, whose own forward may do anything"
    if not seen.calls:
        return 0, "its blocks are not called with these inputs"
    if repeated := [i for i in sorted(set(seen.calls)) if seen.calls.count(i) > 1]:
        return 0, f"{names[repeated[0]]} is called {seen.calls.count(repeated[0])} times in a forward"
    if seen.calls != list(range(len(names))):
        return 0, f"its blocks are called in the order {', '.join(map(str, seen.calls))}"
    if False in seen.chained:
        i = seen.chained.index(False)
        return 0, f"{names[i]} is not called with what {names[i - 1]} returns: the model does something in between"
    ordinary = len(blocks) - 1
    for i in reversed(range(len(blocks))):
        if type(blocks[i]) is not type(blocks[-1]) or seen.shapes[i][0] != seen.shapes[i][1]:
            break
        ordinary = i
    if len(blocks) - ordinary >= 2:
        return ordinary, ""
    kinds = list(dict.fromkeys(type(block).__name__ for block in blocks))
    if len(kinds) > 1:
        return 0, f"its blocks are of different kinds: {', '.join(kinds)}"
    i = max(i for i, (x, y) in enumerate(seen.shapes) if x != y)
    return 0, f"{names[i]} ({kinds[0]}) changes the shape from {seen.shapes[i][0]} to {seen.shapes[i][1]}"


def _shape(x: Any) -> Any:
    return list(x.shape) if isinstance(x, Tensor) else type(x).__name__
