"""Layers that a model calls, each sharded by FSDP2: hooks stay outside of them, and parameters are gathered."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.layers import main
from tests.distributed.two_processes import run


def test_gradients_are_those_of_stored_layers(tmp_path: Path) -> None:
    for found in run(main, tmp_path).values():
        assert found["gradients"] <= 1e-10 and found["is rebuilt"]
