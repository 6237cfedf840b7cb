"""Strategy x launcher x entry x precision: each cell within rounding of the stock strategy."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cells import GROUPS, STRATEGIES, TOLERANCES, cells
from tests.distributed.pair import run

pytestmark = pytest.mark.xdist_group("matrix")  # one worker runs the processes, once


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    results: dict[str, dict[Any, float]] = {}
    folders: dict[str, Any] = {}

    def of(group: str) -> dict[Any, float]:
        if group not in results:
            folders[group] = tmp_path_factory.mktemp(group)
            reference = []
            if group == "spawn":
                of("popen")
                reference = [folders["popen"] / "reference.pt"]
            results[group] = run("cells.py", folders[group], group, *reference)
        return results[group]

    return of


SLOW = ("start methods",)
CELLS = [
    pytest.param(group, cell, id="-".join(cell), marks=[pytest.mark.slow] if group in SLOW else [])
    for group in GROUPS
    for cell in cells(group)
]


@pytest.mark.parametrize(("group", "cell"), CELLS)
def test_as_the_stock_strategy(found: Any, group: str, cell: tuple[str, str, str, str]) -> None:
    _, precision, entry, _ = cell
    assert found(group)[cell] <= (TOLERANCES[precision] if entry == "fit" else 1e-6)
    assert STRATEGIES[cell[0]][2] == (1 if group == "one" else 2)
