from __future__ import annotations

import pytest

from lightning_revlib.nn.engine.tape import Tape
from lightning_revlib.nn.plan import profile as measure
from lightning_revlib.nn.treatments import offload
from lightning_revlib.nn.treatments import prefetch as overlap
from lightning_revlib.nn.treatments import run as execution
from tests.nn.streams import Device


@pytest.fixture(autouse=True)
def one_by_one(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are undone one by one, as large ones are, though those of tests are small."""
    if request.module.__name__ != "tests.nn.test_at_once":
        monkeypatch.setattr(Tape, "AT_ONCE", 0)


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
