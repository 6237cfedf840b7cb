"""Every snippet of the README runs: Python as it stands, `revlib` commands for one epoch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs(program: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("revlib")])
def test_commands(command: str, tmp_path: Path) -> None:
    arguments = [*command.split()[1:], "trainer.max_epochs=1"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_revlib.cli.main", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_two_commands_come_first() -> None:
    assert [line.split("#")[0].strip() for line in COMMANDS[:2]] == ["make train", "make test"]
    assert len(PROGRAMS) >= 2
