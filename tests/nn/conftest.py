from __future__ import annotations

import pytest

from lightning_revlib.nn import execution, measure, offload, overlap
from tests.nn.streams import Device


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The CPU, played as a device with streams; active, it finds races."""
    device = Device()
    for user in (execution, measure):
        monkeypatch.setattr(user, "has_streams", lambda _: True)
    for user in (overlap, offload):
        monkeypatch.setattr(user, "get_device_module", lambda _: device)
    monkeypatch.setattr(overlap, "side_stream", lambda _: device.side)
    monkeypatch.setattr(offload, "copy_stream", lambda _: device.side)
    monkeypatch.setattr(offload, "SMALLEST", 0)
    return device
