"""A memory budget as a user gives it: bytes, a text such as "2GiB", a fraction, or "auto"."""

from __future__ import annotations

import math
import re
from typing import TypeAlias

import torch

MemoryBudget: TypeAlias = int | float | str
MARGIN = 0.1  # of the free memory, which "auto" leaves
DECIMAL_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS = DECIMAL_UNITS | {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


class BudgetError(ValueError):
    """A memory budget is too small for its stacks with their input."""


def read_budget(value: MemoryBudget) -> int | float | None:
    """Return bytes as an int, a fraction as a float, None for "auto".

    Raises:
        ValueError, TypeError: for any other value.
    """
    if isinstance(value, str):
        if value == "auto":
            return None
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", value.lower())
        if match and match[2] in UNITS and 1 <= (count := float(match[1]) * UNITS[match[2]]) < math.inf:
            return int(count)
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"memory_budget={value!r}: pass bytes, a text such as '2GiB', a fraction, or 'auto'")
    elif (isinstance(value, int) and value > 0) or 0 < value <= 1:
        return value
    raise ValueError(
        f"memory_budget={value!r}: pass a positive number of bytes as an int or a text such as '2GiB' or '800MB', a"
        " fraction of ordinary autograd's peak between 0.0 and 1.0 as a float, not a text, or 'auto' on a CUDA device"
    )


def limit_in_bytes(value: MemoryBudget, plain: int) -> int:
    """Return the bytes that a budget allows, if ordinary autograd takes `plain`.

    Raises:
        ValueError: for "auto" without a CUDA device.
    """
    read = read_budget(value)
    if isinstance(read, float):
        return int(read * plain)
    if read is not None:
        return read
    if not torch.cuda.is_available():
        raise ValueError(
            "memory_budget='auto' needs a CUDA device; pass bytes, such as '2GiB', or a fraction, such as 0.5"
        )
    free, _ = torch.cuda.mem_get_info()
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int((free + cached) * (1 - MARGIN))
