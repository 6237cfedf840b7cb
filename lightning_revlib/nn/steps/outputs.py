"""Outputs of blocks: the branch first, and perhaps more, in a tuple, a dict or a dataclass."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


def split_output(out: Any) -> tuple[Any, Any]:
    """Return the first member of what a block returned, and the others: in a tuple, or in a dict by name."""
    if isinstance(out, Mapping):
        names = list(out)
        return (out[names[0]], {name: out[name] for name in names[1:]}) if names else (out, None)
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        names = [field.name for field in dataclasses.fields(out)]
        return getattr(out, names[0]), {name: getattr(out, name) for name in names[1:]}
    if isinstance(out, Sequence) and len(out):
        return out[0], tuple(out[1:])
    return out, None


def replace_first(out: Any, first: Any) -> Any:
    """Return what a block returned with another first member, in the same type."""
    if isinstance(out, Mapping):  # before dataclasses: some are both
        copied = copy.copy(out)
        copied[next(iter(out))] = first  # type: ignore[index]
        return copied
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        changed: Any = copy.copy(out)  # `dataclasses.replace` would make one anew, and perhaps compute from the member
        object.__setattr__(changed, dataclasses.fields(out)[0].name, first)
        return changed
    if hasattr(out, "_fields"):
        return out._replace(**{out._fields[0]: first})
    if isinstance(out, Sequence) and len(out):
        return type(out)([first, *out[1:]])  # type: ignore[call-arg]
    return out
