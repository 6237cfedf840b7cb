from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def no_group_is_left() -> Iterator[None]:
    """A strategy of several processes sets up a process group for one device as well, and leaves it."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
