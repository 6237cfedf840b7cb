"""FSDP2's policies, accumulation, clipping, exact resumption and Fabric give what the plain way gives."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.sharded import main
from tests.distributed.two_processes import run

HOLDS = [
    "blocks are sharded each",
    "root is sharded",
    "keys",
    "fits again",
    "plans of a budget",
    "a mixture",
    "sharded as before after measuring",
    "fabric passes arguments on to DDP",
]
NEAR = {
    "accumulation": 1e-6,
    "clipping by norm": 1e-6,
    "clipping by value": 1e-6,
    "optimizer in backward": 1e-6,
    "own sharding": 1e-6,
    "layers": 1e-6,
    "kept after forward": 1e-6,
    "offload policy": 1e-6,
    "budget": 1e-6,
    "gradients under a budget": 1e-12,
    "inverse": 1e-5,
    "fabric, reversible": 1e-6,
    "fabric, reversible_fsdp": 1e-6,
    "mixed precision policy": 1e-2,  # compared with autocast, which rounds at other points
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(main, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("name", HOLDS)
def test_holds(found: Any, name: str) -> None:
    assert found[name] is True


@pytest.mark.parametrize("name", NEAR)
def test_near(found: Any, name: str) -> None:
    assert found[name] <= NEAR[name]


@pytest.mark.parametrize("strategy", ["reversible", "reversible_fsdp"])
def test_exact_resumption_in_two_processes(found: Any, strategy: str) -> None:
    equal = [same for name, same in found.items() if name.startswith(f"resumed {strategy} ")]
    assert len(equal) >= 4 and all(equal)


def test_errors_name_the_way_out(found: Any) -> None:
    assert found["too early"].startswith("net was sharded before it was swapped; in configure_model, call revlib.swap")
    assert "take strategy='reversible_fsdp'" in found["in backward under ddp"]
