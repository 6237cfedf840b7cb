"""Know for which module tensors are made: the innermost one whose forward, or whose backward, is running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_revlib.nn.internals import graph_task, pytree


class Places:
    """The path of the module that is running, by hooks on all modules.

    In forward, and where backward runs a module again, it is the innermost module that has been called. In backward, it
    is the module whose output's gradient backward has come to last. None outside of all modules.

    Args:
        paths: of the modules, by id.
        on_call: called in forward with a module's path, and its inputs or its outputs.
    """

    def __init__(self, paths: dict[int, str], on_call: Callable[[str, bool, Any], None]) -> None:
        self.paths, self.on_call = paths, on_call
        self._running: list[str] = []
        self._reached: str | None = None
        self.is_backward = False

    @property
    def here(self) -> str | None:
        if self._running:
            return self._running[-1]
        return self._reached if self.is_backward else None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Have the hooks inside."""
        with ExitStack() as hooks:
            hooks.callback(register_module_forward_pre_hook(self._enter).remove)
            hooks.callback(register_module_forward_hook(self._leave, always_call=True).remove)
            yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        path = self.paths.get(id(module))
        if path is None:
            return
        self._running.append(path)
        if graph_task() < 0:
            self.on_call(path, True, args)

    def _leave(self, module: nn.Module, args: Any, out: Any) -> None:
        path = self.paths.get(id(module))
        if path is None or path not in self._running:
            return
        while self._running.pop() != path:  # a module inside that an exception has left
            pass
        if graph_task() < 0:
            self.on_call(path, False, out)
            if torch.is_grad_enabled():
                self._watch_backward(path, out)

    def _watch_backward(self, path: str, out: Any) -> None:
        """Note when backward comes to a module's outputs. The hook refers to no tensor and keeps none alive."""
        for tensor in [out] if isinstance(out, Tensor) else pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(partial(self._reach, path))

    def _reach(self, path: str, grads: Any) -> None:
        if self.is_backward:  # else a block calls autograd itself
            self._running.clear()  # of modules that ran again only as far as was needed
            self._reached = path
