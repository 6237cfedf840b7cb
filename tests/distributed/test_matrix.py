"""Strategy x launcher x entry x precision: each cell within rounding of the stock strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.cells import GROUPS, STRATEGIES, TOLERANCES, cells
from tests.distributed.pair import run


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    results: dict[str, dict[Any, float]] = {}

    def of(group: str) -> dict[Any, float]:
        if group not in results:
            results[group] = run("cells.py", tmp_path_factory.mktemp(group), group)
        return results[group]

    return of


@pytest.mark.parametrize(
    ("group", "cell"), [(group, cell) for group in GROUPS for cell in cells(group)], ids=lambda x: "-".join([*x][:4])
)
def test_as_the_stock_strategy(found: Any, group: str, cell: tuple[str, str, str, str]) -> None:
    _, precision, entry, _ = cell
    assert found(group)[cell] <= (TOLERANCES[precision] if entry == "fit" else 1e-6)
    assert STRATEGIES[cell[0]][2] == (1 if group == "one" else 2)
