"""Every snippet of the README runs: Python as it is, `revlib` commands for one epoch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_revlib.cli.main import main

README = (Path(__file__).parent.parent / "README.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_programs(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("revlib")])
def test_commands(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command.split()[1:], "trainer.max_epochs=1"]) == 0


def test_the_two_commands_come_first() -> None:
    assert [line.split("#")[0].strip() for line in COMMANDS[:2]] == ["make train", "make test"]
    assert len(PROGRAMS) >= 2
