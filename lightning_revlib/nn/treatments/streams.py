"""Devices with streams, on which copies and kernels run beside each other."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


def has_streams(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type


@lru_cache(maxsize=64)
def side_stream(module: Any, device: torch.device, use: str) -> Any:
    """Return the stream for one use on a device: always the same, so that memory of its pool serves each backward."""
    return module.Stream(device=device)
