"""`revlib report simulate=true`: whether a recipe's training fits into a memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_revlib.cli.main import main


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["momentumnet", "reformer"])
def test_what_fits(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    words = ["depth=6", "batch_size=64", "memory=20MiB"]
    if recipe == "reformer":
        words = ["depth=2", "recipe.dim=16", "data.length=64", "batch_size=2", "memory=3MiB"]
    assert main(["report", "simulate=true", f"recipe={recipe}", "precision=bf16-mixed", *words]) == 0
    out = capsys.readouterr().out
    rows = {row[0]: row[1:] for line in out.splitlines() if len(row := re.findall(r"[^│ ]+", line)) >= 5}
    assert {"plain", "checkpointed", "reversible"} <= rows.keys()
    batches = [int(rows[name][3]) for name in ("plain", "reversible")]
    assert 0 < batches[0] < batches[1]
    assert ("longest sequence" in out) == (recipe == "reformer")
    assert "with what is left as strategy.memory_budget" in out or "no plan fits" in out


def test_positions_of_one_length_end_the_search_for_a_longer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    words = ["recipe=reformer", "depth=2", "recipe.dim=16", "data.length=64", "recipe.axial=[8,8]", "batch_size=2"]
    assert main(["report", "simulate=true", *words, "memory=1GiB"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert len(rows) == 3 and {row[-2] for row in rows} == {"64"}


def test_an_unknown_device_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "simulate=true", "memory=1GiB", "device=foo"]) == 1
    assert capsys.readouterr().err.startswith("revlib: device=foo: ")


@pytest.mark.parametrize("memory", ["null", "0.5", "auto", "many"])
def test_a_memory_is_a_number_of_bytes(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", "simulate=true", f"memory={memory}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("revlib: memory") and "80GiB" in error and error.count("\n") == 1
