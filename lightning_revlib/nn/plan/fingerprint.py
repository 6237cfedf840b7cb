"""Descriptions of blocks and stacks: those with the same one take the same bytes and work."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.state.attributes import PLAIN
from lightning_revlib.nn.steps.step import Step

ADDRESS = re.compile(" at 0x[0-9a-f]+")


def description(step: Step) -> tuple[Any, ...]:
    """Return what two steps agree in that take the same bytes and work, as far as can be told."""
    arguments = [_text(x) for x in pytree.tree_leaves((step.args, step.kwargs))]
    branch = step.key.partition(".")[2]
    chunks = getattr(step, "count", 1)
    return branch, chunks, *_of_module(step.module), _text(step.coupling), repr(arguments)


def _of_module(module: nn.Module, but: str = "") -> tuple[Any, ...]:
    settings = [
        sorted((k, _text(v)) for k, v in vars(m).items() if _is_setting(k, v) and k != but) for m in module.modules()
    ]
    parameters = [(p.shape, p.dtype, p.requires_grad) for p in module.parameters()]
    return repr(module), repr(settings), tuple(parameters)


def _is_setting(name: str, value: Any) -> bool:
    if isinstance(value, (*PLAIN, tuple)):
        return True
    return not name.startswith("_") and name != "forward" and not isinstance(value, (Tensor, nn.Module))


def _text(value: Any, depth: int = 4) -> str:
    """Return a text about a value that is the same for alike blocks and in each process: it has no addresses."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    kind, inner = type(value).__qualname__, depth - 1
    if isinstance(value, nn.Module) or not depth:
        return kind
    if isinstance(value, Mapping):
        return f"{kind} {[(_text(k, inner), _text(v, inner)) for k, v in value.items()]}"
    if isinstance(value, (list, tuple, Set)):
        leaves = [_text(v, inner) for v in value]
        return f"{kind} {sorted(leaves) if isinstance(value, Set) else leaves}"
    if type(value).__repr__ is object.__repr__:
        return f"{kind} {_text(getattr(value, '__dict__', None), min(inner, 2))}"
    return f"{ADDRESS.sub('', repr(value))} {getattr(getattr(value, '__code__', None), 'co_firstlineno', '')}"


def fingerprint(stack: Any) -> str:
    """Return a hash of all that a stack's costs depend on, besides the signature of its inputs."""
    o = stack.options
    options = [stack.couplings, o.branches, stack.chunks, o.chunk_dim, o.stream_dtype, o.residual]
    options += [o.grid_bits, o.split_dim, o.ordinary, o.offload, o.context_fn]
    modules = [_of_module(m, but="training") for m in stack]
    text = repr([torch.__version__, *map(_text, options), *modules])
    return hashlib.sha256(text.encode()).hexdigest()
