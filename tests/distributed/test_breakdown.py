from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import breakdown, two_processes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return two_processes.run(breakdown.main, tmp_path_factory.mktemp("breakdown"))


def test_owners_add_up_to_the_meter_in_each_process(found: Any) -> None:
    for figures in found.values():
        assert figures["found"] == figures["expected"]
    ddp, fsdp = found["ddp"]["rows"], found["fsdp"]["rows"]
    for owner in ("parameters", "gradients", "optimizer state"):  # of the latter some numbers of steps
        assert 0.5 <= fsdp[owner][2] / ddp[owner][2] < 0.55


def test_a_step_by_ddp_is_simulated_to_the_byte(found: Any) -> None:
    assert found["ddp"]["fake"] == found["ddp"]["rows"]


def test_sharded_parameters_are_not_simulated(found: Any) -> None:
    assert "parameter 0.weight is sharded" in found["fsdp"]["error"]
    assert "simulate the module as it is before fully_shard" in found["fsdp"]["error"]


def test_a_simulation_leaves_the_wrapper_as_it_was(found: Any) -> None:
    for figures in found.values():
        assert figures["after"] == figures["rows"]
