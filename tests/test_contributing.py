"""The programs of CONTRIBUTING.md and docs/recipes/index.md that name their file, and the commands that use them."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_revlib import COUPLINGS
from lightning_revlib.cli.main import main

ROOT = Path(__file__).parent.parent


def write(document: str, folder: Path) -> None:
    """Write the blocks of a document that begin with the name of a file."""
    for name, text in re.findall(
        r"```\w+\n# ([\w/]+\.(?:py|yaml))\n(.*?)```", (ROOT / document).read_text(), re.DOTALL
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def test_a_coupling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(COUPLINGS, "weighted", COUPLINGS["additive"])  # restored after the test
    write("CONTRIBUTING.md", tmp_path)
    runpy.run_path(str(tmp_path / "weighted.py"), run_name="__main__")
    assert "gradients differ by" in capsys.readouterr().out


def test_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write("CONTRIBUTING.md", tmp_path)
    commands = re.findall(r"^revlib (.*mlpnet.*)$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert main(command.split()) == 0, command
    out = capsys.readouterr().out
    assert "MLPNet on Digits" in out and "of 360" in out and "picture: " in out
    monkeypatch.delitem(sys.modules, "mlpnet")


@pytest.mark.slow
def test_flops_of_the_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    write("docs/recipes/index.md", tmp_path)
    runpy.run_path(str(tmp_path / "flops.py"), run_name="__main__")
    rows = capsys.readouterr().out.splitlines()
    page = (ROOT / "docs/recipes/index.md").read_text().splitlines()
    assert len(rows) == 4 and [row for row in rows if row not in page] == []


def test_a_program_of_ones_own(tmp_path: Path) -> None:
    write("docs/recipes/index.md", tmp_path)
    words = [sys.executable, "-W", "ignore", "main.py", "recipe.dropout=0"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (used,) = tmp_path.glob("outputs/*/*/.hydra/config.yaml")
    assert used.read_text().startswith("depth: 5\n")
