"""Torch's own layers, of whose calls it is known that they change no attributes and, but for a few, no parameters."""

from __future__ import annotations

from collections import OrderedDict
from types import FunctionType

import torch
from torch import nn

_LAYERS = [kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
_FORWARDS = {kind: kind.forward for kind in _LAYERS if kind.forward is not nn.Module.forward}  # no containers
_USUAL = frozenset({bool, int, float, str, type(None), dict, OrderedDict, set, list, tuple, torch.Size, FunctionType})


def is_torch_layer(m: nn.Module) -> bool:
    """Return whether a call of the module runs torch's code only: no subclass's, no hook's, no other `forward`."""
    kind = type(m)
    return (
        kind in _FORWARDS
        and kind.forward is _FORWARDS[kind]
        and not (m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m))
    )


def is_inert(m: nn.Module) -> bool:
    """Return whether it is a torch layer without a tensor or a generator among its attributes."""
    return is_torch_layer(m) and has_only_usual_attributes(m)


def has_only_usual_attributes(m: nn.Module) -> bool:
    """Return whether no attribute of the module itself is a tensor or a generator, by a look at the types of all."""
    return _USUAL.issuperset(map(type, vars(m).values()))
