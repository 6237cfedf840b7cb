from __future__ import annotations

from pathlib import Path

from tests.distributed import breakdown, two_processes


def test_owners_add_up_to_the_meter_in_each_process(tmp_path: Path) -> None:
    found = two_processes.run(breakdown.main, tmp_path)
    for figures in found.values():
        assert figures["found"] == figures["expected"]
    ddp, fsdp = found["ddp"]["rows"], found["fsdp"]["rows"]
    for owner in ("parameters", "gradients", "optimizer state"):  # of the latter some numbers of steps
        assert 0.5 <= fsdp[owner][2] / ddp[owner][2] < 0.55
