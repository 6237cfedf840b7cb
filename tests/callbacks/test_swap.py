"""ReversibleCallback swaps under a strategy that does not; tests/strategies compare it with the reversible one."""

from __future__ import annotations

from pathlib import Path

import pytest

import lightning_revlib as revlib
from tests.strategies.helpers import BUILT, ENTRIES, Net, data, trainer


@pytest.mark.parametrize("built", BUILT)
@pytest.mark.parametrize("entry", ENTRIES)
def test_each_entry_swaps(tmp_path: Path, entry: str, built: str) -> None:
    net = Net(built)
    run = trainer(tmp_path, callbacks=[revlib.ReversibleCallback({"net": {"coupling": "midpoint"}})], max_epochs=1)
    getattr(run, entry)(net, data())
    assert type(net.net) is revlib.ReversibleSequential and net.net.couplings == (revlib.Midpoint(),)
