"""The bytes of a training step by owner: they add up to what `MemoryMeter` counts."""

from __future__ import annotations

from pathlib import Path

import pytest

import lightning_revlib as revlib
from tests.accounting.programs import FAMILIES, RECIPES, WAYS, by_hand, optimizer, program


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*FAMILIES, *RECIPES])
def test_owners_add_up_to_the_meter(name: str, way: str, tmp_path: Path) -> None:
    model, batch, _ = program(name, tmp_path).run(way)
    steps = optimizer(model.parameters())
    expected = by_hand(model, batch, steps)
    memory = revlib.memory(model, batch, steps)
    existing = sum(memory.existing.values())
    assert [sum(each.bytes.values()) - existing for each in memory.moments] == expected
    assert memory.highest.total == existing + max(expected)
