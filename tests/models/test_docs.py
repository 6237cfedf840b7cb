"""The snippets of docs/guide/models.md run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # which transformers' Trainer needs
TEXT = (Path(__file__).parents[2] / "docs" / "guide" / "models.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("program", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_programs(program: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if "revlib.report(" in program:
        assert "lightning_revlib.swap(model, {'transformer.h'" in done.stdout
