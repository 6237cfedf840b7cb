"""Blocks of several residual branches, such as attention and feed-forward, each made a step of its own.

block(x) = y + g(y) with y = x + f(x)    becomes the two steps f and g
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, TypeAlias

from torch import Tensor, nn

from lightning_revlib.nn.steps.outputs import split_output

BranchSpec: TypeAlias = Sequence[str] | Callable[..., Any]


class Branch:
    """One branch of a block, without its skip connection: parts of the block by name, called one after the other.

    ``["ln_1", "attn"]`` is x -> attn(ln_1(x)). A part is a module or a method. It gets those of the block's arguments
    that its own signature names, and its first output is the next part's input. A callable instead of names gets all
    arguments: ``branch(block, x, *args, **kwargs)``.
    """

    def __init__(self, block: nn.Module, spec: BranchSpec) -> None:
        self.block, self.spec = block, spec

    @property
    def name(self) -> str:
        return getattr(self.spec, "__name__", "branch") if callable(self.spec) else self.spec[-1]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if callable(self.spec):
            return self.spec(self.block, x, *args, **kwargs)
        given = self._by_name(args, kwargs)
        for name in self.spec:
            part = getattr(self.block, name)
            out = part(x, **_accepted(part, given))
            x = out if isinstance(out, Tensor) else split_output(out)[0]
        return x

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return those of a block's arguments that the branch gets."""
        if callable(self.spec):
            return args, kwargs
        given = self._by_name(args, kwargs)
        return [_accepted(getattr(self.block, name), given) for name in self.spec]

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names, _ = _parameters(type(self.block).forward)
        return {**dict(zip(names[1:], args, strict=False)), **kwargs}


def _accepted(part: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a part of a block accepts by name, besides its first."""
    part = part.forward if isinstance(part, nn.Module) else part
    names, accepts_others = _parameters(getattr(part, "__func__", part))
    names = names[1:] if inspect.ismethod(part) else names  # of a method, the first is its module
    return {name: value for name, value in given.items() if accepts_others or name in names}


@lru_cache(maxsize=256)
def _parameters(function: Any) -> tuple[list[str], bool]:
    """Return the names of a function's parameters but the first, and whether it accepts others by name."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [p.name for p in parameters], any(p.kind is p.VAR_KEYWORD for p in parameters)


def is_list(value: Any) -> bool:
    """Return whether the value is a sequence that is not empty, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


def check_branches(blocks: Mapping[str, nn.Module], branches: Any, residual: bool) -> None:
    """Raise ValueError if `branches` do not describe the blocks."""
    if residual:
        raise ValueError("branches with residual=True: branches are without their skip connection; leave residual out")
    if not is_list(branches):
        raise ValueError(f"branches={branches!r}: name the parts of each branch, [['norm1', 'attn'], ['norm2', 'mlp']]")
    for spec in branches:
        if not callable(spec) and not is_list(spec):
            raise ValueError(f"branches={branches!r}: {spec!r} is no list of names; a branch of one part is ['mlp']")
        for (key, block), name in product(blocks.items(), () if callable(spec) else spec):
            if not callable(getattr(block, name, None)):
                parts = [child for child, _ in block.named_children()]
                near = difflib.get_close_matches(name, parts, n=1, cutoff=0.5) or parts
                raise ValueError(f"branches: block {key} ({type(block).__name__}) has no {name!r}; it has {near}")
