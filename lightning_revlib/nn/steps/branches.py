"""Blocks of several residual branches, such as attention and feed-forward, each made a step of its own.

block(x) = y + g(y) with y = x + f(x)    becomes the two steps f and g
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

from torch import Tensor, nn

from lightning_revlib.nn.steps.outputs import split_output

BranchSpec: TypeAlias = Sequence[str] | Callable[..., Any]


class Branch:
    """One branch of a block, without its skip connection: parts of the block by name, called one after the other.

    ``["ln_1", "attn"]`` is x -> attn(ln_1(x)). A part is a module or a method; of what the block is
    called with, it gets the arguments that its own signature names; of what it returns, the first
    goes on. A callable instead of names gets all: ``branch(block, x, *args, **kwargs)``.
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
            names, others = _parameters(_function(part))
            out = part(x, **{key: value for key, value in given.items() if others or key in names[1:]})
            x = out if isinstance(out, Tensor) else split_output(out)[0]
        return x

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the branch gets of a block's arguments."""
        if callable(self.spec):
            return args, kwargs
        taken = [_parameters(_function(getattr(self.block, name))) for name in self.spec]
        return {
            key: value
            for key, value in self._by_name(args, kwargs).items()
            if any(others or key in names[1:] for names, others in taken)
        }

    def _by_name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {**dict(zip(_parameters(type(self.block).forward)[0][2:], args, strict=False)), **kwargs}


def check_branches(blocks: Mapping[str, nn.Module], branches: Any, residual: bool) -> None:
    """Raise where `branches` do not describe the blocks."""
    if residual:
        raise ValueError("branches with residual=True: branches are without their skip connection; leave residual out")
    if not isinstance(branches, Sequence) or isinstance(branches, str) or not branches:
        raise ValueError(f"branches={branches!r}: name the parts of each branch, [['norm1', 'attn'], ['norm2', 'mlp']]")
    for spec in branches:
        if callable(spec):
            continue
        if isinstance(spec, str) or not isinstance(spec, Sequence) or not spec:
            raise ValueError(f"branches={branches!r}: {spec!r} is no list of names; a branch of one part is ['mlp']")
        for key, block in blocks.items():
            for name in spec:
                if not callable(getattr(block, name, None)):
                    parts = [child for child, _ in block.named_children()]
                    near = difflib.get_close_matches(name, parts, n=1, cutoff=0.5) or parts
                    raise ValueError(f"branches: block {key} ({type(block).__name__}) has no {name!r}; it has {near}")


def _function(part: Any) -> Any:
    part = part.forward if isinstance(part, nn.Module) else part
    return getattr(part, "__func__", part)


@lru_cache(maxsize=256)
def _parameters(function: Any) -> tuple[list[str], bool]:
    """The names of a function's parameters, self included, and whether it takes any others by name."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters], any(p.kind is p.VAR_KEYWORD for p in parameters)
