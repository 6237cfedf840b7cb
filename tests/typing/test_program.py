"""The types of all public names, as mypy tells a user of the installed package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_revlib as revlib

PROGRAM = Path(__file__).parent / "program.py"


def test_the_program_uses_every_public_name() -> None:
    words = {*re.findall(r"\w+", PROGRAM.read_text())}
    assert {*revlib.__all__, "ReversibleTrainerCallback"} <= words


@pytest.mark.slow
def test_mypy_accepts_it_in_strict_mode(tmp_path: Path) -> None:
    installed = str(Path(revlib.__file__).parent.parent)  # where mypy finds an editable package, too
    options = ["--strict", "--follow-imports=silent", "--config-file=", f"--cache-dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(PROGRAM)],
        env={**os.environ, "MYPYPATH": installed},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_hovering_shows_a_type_and_not_any(tmp_path: Path) -> None:
    names = [*revlib.__all__, "ReversibleTrainerCallback"]
    program = tmp_path / "hover.py"
    lines = ["import lightning_revlib as revlib", *(f"reveal_type(revlib.{name})" for name in names)]
    program.write_text("\n".join(lines))
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--config-file=", str(program)],
        env={**os.environ, "MYPYPATH": str(Path(revlib.__file__).parent.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert len(revealed) == len(names) and "Any" not in revealed
