"""The programs of docs/guide/memory.md run, and what the page says of them is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
TEXT = (Path(__file__).parents[2] / "docs" / "guide" / "memory.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_programs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(PROGRAMS[number], f"memory.md, {number}", "exec"), {})
    printed = capsys.readouterr().out
    if number == 0:
        assert printed.strip() in TEXT and (tmp_path / "step.png").exists()
    if number == 1:
        assert "# compute the loss by chunks: saves 43.9 MiB" in printed
        assert "hidden states of 2 blocks of model.layers: saves 256.0 KiB" in printed
        assert "when it has ended (logits and loss): saves 256.0 KiB" in printed
