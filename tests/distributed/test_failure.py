"""A training that is killed again and again ends with the same bits; a rank that fails ends the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import failing_rank, killed_training
from tests.distributed.two_processes import ENVIRONMENT, run


@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 6))])
def test_ten_kills_change_no_bit(tmp_path: Path, seed: int) -> None:
    found = run(killed_training.main, tmp_path, seed, processes=1)
    assert [status for *_, status in found["hits"]] == [-signal.SIGKILL] * 10
    assert found["equal"] and found["keys"]


@pytest.mark.parametrize(
    ("rank", "how"),
    [
        pytest.param(1, "kill"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, "kill"), (0, "raise"), (1, "raise")]),
    ],
)
def test_a_rank_that_fails_ends_the_others_with_a_message(tmp_path: Path, rank: int, how: str) -> None:
    launched = ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_PORT")
    outside = {name: value for name, value in os.environ.items() if name not in launched}
    done = subprocess.run(
        [sys.executable, failing_rank.__file__, str(tmp_path), str(rank), how],
        env={**outside, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,  # also for the other rank, which holds the pipe
    )
    assert done.returncode != 0
    messages = {"raise": ["this rank fails"], "kill": ["terminated with code", "closed by peer", "reset by peer"]}
    assert any(message in done.stdout for message in messages[how]), done.stdout
