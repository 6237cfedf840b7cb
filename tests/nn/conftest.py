from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from tests.nn.fake_device import Device, play


@pytest.fixture
def device() -> Iterator[Device]:
    """Yield the CPU, played as a device with streams; active, it finds races."""
    with play(Device()) as device:
        yield device


@pytest.fixture
def without_collector() -> Iterator[None]:
    """Leave what is freed to reference counts."""
    gc.disable()
    yield
    gc.enable()
