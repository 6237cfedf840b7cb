"""The DeepSpeed strategy says what it needs; tests/test_gpu.py runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

import lightning_revlib as revlib
from tests.strategies.helpers import trainer


def test_errors_name_the_way_out(tmp_path: Path) -> None:
    try:
        import deepspeed  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ModuleNotFoundError, match=r"stage_3' needs deepspeed .* pip install deepspeed"):
            trainer(tmp_path, strategy="reversible_deepspeed_stage_3_offload")
    with pytest.raises(ValueError, match="stage=4"):
        revlib.ReversibleDeepSpeedStrategy(stage=4)
    with pytest.raises(TypeError, match="no argument stge=2; did you mean stage"):
        revlib.ReversibleDeepSpeedStrategy(stge=2)
