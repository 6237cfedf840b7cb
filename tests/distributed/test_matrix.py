"""Strategy x launcher x entry x precision: each cell within rounding of the stock strategy."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.cells import GROUPS, cells, main
from tests.distributed.two_processes import run
from tests.strategies.helpers import TOLERANCES

CELLS = [
    pytest.param(group, cell, id="-".join(cell), marks=[pytest.mark.slow] if group == "start methods" else [])
    for group in GROUPS
    for cell in cells(group)
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the distances of a group's cells; a group is run when it is first asked for."""
    results: dict[str, dict[Any, float]] = {}
    folders: dict[str, Any] = {}

    def of(group: str) -> dict[Any, float]:
        if group not in results:
            folders[group] = tmp_path_factory.mktemp(group)
            if group == "ranks":
                results[group] = run(main, folders[group], group)
            else:  # one process, which starts the two itself
                reference = []
                if group == "spawn":
                    of("ranks")
                    reference = [folders["ranks"] / "reference.pt"]
                results[group] = run(main, folders[group], group, *reference, processes=1, timeout=900)
        return results[group]

    return of


@pytest.mark.parametrize(("group", "cell"), CELLS)
def test_as_the_stock_strategy(found: Any, group: str, cell: tuple[str, str, str, str]) -> None:
    _, precision, entry, _ = cell
    assert found(group)[cell] <= (TOLERANCES[precision] if entry == "fit" else 1e-6)
