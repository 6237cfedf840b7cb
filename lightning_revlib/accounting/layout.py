"""The parts of a model by path: its stacks, their blocks, and what is outside of them."""

from __future__ import annotations

from collections import Counter

from torch import nn

from lightning_revlib.nn.convert.swap import CONTAINERS
from lightning_revlib.nn.stacks.stack import Stack


class Layout:
    """Where the stacks of a model are, with blocks or swapped already, and to which part of the model a path belongs.

    Without a stack of this package, an nn.Sequential or nn.ModuleList is one if two of its children or more are of one
    class and have children themselves.
    """

    def __init__(self, model: nn.Module) -> None:
        self.paths: dict[int, str] = {}  # by id of the module; the first path of one that is shared
        self.stacks: list[str] = []
        for path, module in model.named_modules():
            self.paths.setdefault(id(module), path)
            if _is_stack(module) and self.stack_of(path) is None:
                self.stacks.append(path)
        self.sizes: dict[str, int] = {}  # the number of blocks of each stack
        self.starts, self.ends = set(self.stacks), set(self.stacks)  # modules whose inputs, outputs are a stack's
        self.last_two: dict[str, list[str]] = {}  # blocks of each stack
        for stack in self.stacks:
            blocks = [f"{stack}.{name}" if stack else name for name, _ in model.get_submodule(stack).named_children()]
            self.sizes[stack] = len(blocks)
            self.starts.update(blocks[:1])
            self.ends.update(blocks[-1:])
            self.last_two[stack] = blocks[-2:]
        self._above = {path for path, m in model.named_modules() if self._is_above_others(path, m)}

    def stack_of(self, path: str | None) -> str | None:
        """Return the path of the stack that a module is in, or is itself; None if there is none."""
        found = (stack for stack in self.stacks if path is not None and is_within(path, stack))
        return next(found, None)

    def block_of(self, path: str | None) -> str | None:
        """Return the path of the block that a module is in, or is itself; None if it is in no stack's block."""
        stack = self.stack_of(path)
        if stack is None or path is None or path == stack:
            return None
        prefix = f"{stack}." if stack else ""
        return prefix + path[len(prefix) :].split(".")[0]

    def group_of(self, path: str) -> str:
        """Return the path that stands for a module outside of stacks: of the module above it that has no stack."""
        names, group = path.split("."), ""
        for name in names if path else ():
            group = f"{group}.{name}" if group else name
            if group not in self._above:
                break
        return group

    def _is_above_others(self, path: str, module: nn.Module) -> bool:
        children = [m for m in module.children() if any(True for _ in m.parameters())]
        return not path or len(children) == 1 or any(is_within(stack, path) and stack != path for stack in self.stacks)


def is_within(path: str, other: str) -> bool:
    """Return whether a module is in another, or is the other."""
    return not other or path == other or path.startswith(f"{other}.")


def _is_stack(module: nn.Module) -> bool:
    if isinstance(module, Stack):
        return True
    if not isinstance(module, CONTAINERS) or None in module._modules.values():
        return False
    kinds = Counter(type(block) for block in module if any(True for _ in block.children()))
    return bool(kinds) and max(kinds.values()) > 1
