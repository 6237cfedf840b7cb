"""Descriptions of blocks and stacks: equal descriptions stand for equal costs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.state.attributes import PLAIN
from lightning_revlib.nn.steps.step import Step

ADDRESS = re.compile(" at 0x[0-9a-f]+")


def describe_step(step: Step) -> tuple[Any, ...]:
    """Return all that a step's costs depend on besides its streams, as far as can be told."""
    branch, chunks = step.key.partition(".")[2], getattr(step, "count", 1)
    arguments = map(_describe, pytree.tree_leaves((step.args, step.kwargs)))
    return branch, chunks, *_describe_module(step.module), _describe(step.coupling), *arguments


def _describe_module(module: nn.Module, without: str = "") -> tuple[Any, ...]:
    settings = [
        sorted((name, _describe(x)) for name, x in vars(m).items() if _is_setting(name, x) and name != without)
        for m in module.modules()
    ]
    return repr(module), repr(settings), *[(p.shape, p.dtype, p.requires_grad) for p in module.parameters()]


def _is_setting(name: str, value: Any) -> bool:
    if isinstance(value, (*PLAIN, tuple)):
        return True
    return not name.startswith("_") and name != "forward" and not isinstance(value, (Tensor, nn.Module))


def _describe(value: Any, depth: int = 4) -> str:
    """Return a description of a value that is the same in each process, since it contains no addresses."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    kind, inner = type(value).__qualname__, depth - 1
    if isinstance(value, nn.Module) or not depth:
        return kind
    if isinstance(value, Mapping):
        return f"{kind} {[(_describe(k, inner), _describe(v, inner)) for k, v in value.items()]}"
    if isinstance(value, (list, tuple, Set)):
        leaves = [_describe(v, inner) for v in value]
        return f"{kind} {sorted(leaves) if isinstance(value, Set) else leaves}"
    if type(value).__repr__ is object.__repr__:
        return f"{kind} {_describe(getattr(value, '__dict__', None), min(inner, 2))}"
    return f"{ADDRESS.sub('', repr(value))} {getattr(getattr(value, '__code__', None), 'co_firstlineno', '')}"


def fingerprint(stack: Any) -> str:
    """Return a hash of all that a stack's costs depend on besides the signature of its inputs."""
    o = stack.options
    options = [stack.couplings, o.branches, stack.chunks, o.chunk_dim, o.stream_dtype, o.residual]
    options += [o.grid_bits, o.split_dim, o.ordinary, o.offload, o.context_fn]
    return fingerprint_of(stack, *options)


def fingerprint_of(modules: Iterable[nn.Module], *settings: Any) -> str:
    """Return a hash of modules and settings."""
    descriptions = [_describe_module(m, without="training") for m in modules]
    text = repr([torch.__version__, *map(_describe, settings), *descriptions])
    return hashlib.sha256(text.encode()).hexdigest()
