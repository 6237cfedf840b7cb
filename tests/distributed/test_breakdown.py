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
    ddp, fsdp = found["ddp"]["counted"], found["fsdp"]["counted"]
    for owner in ("parameters", "gradients", "optimizer state"):  # of the latter some numbers of steps
        assert 0.5 <= fsdp[owner][2] / ddp[owner][2] < 0.55


def test_gathered_weights_are_freed_when_they_are_sharded_again(found: Any) -> None:
    block, rest = 2 * 16 * 64 + 64 + 16, 8 * 32 + 32 + 64 + 2  # of one output the second process has padding
    after_forward, highest, *_ = found["fsdp"]["counted"]["gathered weights"]
    assert after_forward == 4 * rest  # FSDP2 keeps those of the module at the root
    assert highest == 4 * (rest + block)


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_simulated_step_agrees_to_the_byte(found: Any, way: str) -> None:
    assert found[way]["before"] == found[way]["fake"] == found[way]["counted"]


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_simulation_leaves_the_model_as_it_was(found: Any, way: str) -> None:
    assert found[way]["after"] == found[way]["counted"]
    model, fresh = found[way]["weights"]
    assert model == fresh


def test_casts_of_gathered_weights_are_casts(found: Any) -> None:
    weights = 2 * 16 * 64  # of a block, two bytes each
    assert found["fsdp"]["casts"] >= 2 * weights


def test_a_model_is_simulated_where_it_is_sharded(found: Any) -> None:
    assert "device='meta': the model is sharded on cpu; leave out device" in found["fsdp"]["elsewhere"]


def test_no_advice_is_counted_after_a_failure_that_leaves_weights_gathered(found: Any) -> None:
    split = "split the batch in two"  # which is counted after the change that fails
    assert split in found["ddp"]["advice"] and split not in found["fsdp"]["advice"]
