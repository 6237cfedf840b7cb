"""A run resumes from a checkpoint of any strategy under any other, as the stock strategy does from its own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.checkpoints import OPTIMIZERS, kinds, main
from tests.distributed.two_processes import run

CELLS = [
    (optimizer, first, then)
    for optimizer in OPTIMIZERS
    for first in kinds(optimizer)
    for then in kinds(optimizer)
    if (first, then) != ("fsdp, shards", "plain")
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(main, tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize("cell", CELLS, ids=" > ".join)
def test_a_run_resumes(found: Any, cell: tuple[str, str, str]) -> None:
    assert found[cell] <= 1e-6


def test_a_plain_module_loads_what_was_sharded(found: Any) -> None:
    assert found["loaded"] == "CoupledSequential"
    assert found["keys"] == [True, True]
