"""Every snippet of README and documentation runs: Python as it is, `revlib train` for one epoch."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from lightning_revlib.cli.main import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# tests/models runs the snippets of guide/models.md, tests/accounting those of guide/memory.md; the snippet of
# recipes/index.md needs a network of the reader's
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").rglob("*.md")) if p.parts[-2:] not in {
    ("guide", "models.md"), ("guide", "memory.md"), ("recipes", "index.md")
})]  # fmt: skip
CLI = "docs/guide/lightning-cli.md"


def blocks(language: str, page: Path) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


PROGRAMS = {
    f"{page.relative_to(ROOT).as_posix()}, {number}": program
    for page in PAGES
    for number, program in enumerate(blocks("python", page), 1)
}
COMMANDS = [
    line.split("#")[0].strip()
    for page in (ROOT / "README.md", ROOT / "docs/index.md", ROOT / "docs/guide/cli.md")
    for block in blocks("bash", page)
    for line in block.splitlines()
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in PROGRAMS if not name.startswith(CLI)])
def test_programs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(PROGRAMS[name], name, "exec"), {"__name__": "__main__"})
    page = (ROOT / name.split(",")[0]).read_text().splitlines()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row not in page] == []  # the figures of the page


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("command", "".join(blocks("console", ROOT / CLI)).splitlines())
def test_lightning_cli(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse")
    monkeypatch.chdir(tmp_path)
    quiet = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    monkeypatch.setattr(sys, "argv", [*shlex.split(command)[2:], *quiet])
    exec(compile(PROGRAMS[f"{CLI}, 1"], CLI, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", dict.fromkeys(c for c in COMMANDS if c.startswith("revlib")))
def test_commands(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = command.split()[1:]
    assert main([*words, "trainer.max_epochs=1"] if words[0] == "train" else words) == 0


def test_the_two_commands_come_first() -> None:
    assert COMMANDS[:2] == ["make train", "make test"]
    assert {name.split(",")[0] for name in PROGRAMS} >= {"README.md", "docs/index.md", CLI}


def test_links_of_the_readme_are_absolute_and_lead_to_files_of_the_repository() -> None:
    base = "https://github.com/lightning-revlib/lightning-revlib/blob/main/"
    defined = dict(re.findall(r"^\[(.+?)\]: (\S+)$", README, re.MULTILINE))
    body = README.split("\n[docs]: ")[0]
    assert [name for name in defined if f"[{name}]" not in body] == []
    assert [name for name in re.findall(r"\]\[(.+?)\]", body) if name not in defined] == []
    for address in defined.values():
        assert (ROOT / address.removeprefix(base).split("#")[0]).exists(), address
    direct = re.findall(r"\]\((\S+?)\)", README)
    assert all(link.startswith(("https://", "#")) for link in direct)


def test_the_readme_has_the_figures_of_the_measurements() -> None:
    """Its table of bytes is the table of figures.md, with one decimal."""
    figures = (ROOT / "docs/measurements/figures.md").read_text()
    rows = figures[figures.index("| **MLP**: plain |") :].splitlines()[:4]
    ours = README[README.index("| plain autograd | 19.0") :].splitlines()[:4]
    for row, here in zip(rows, ours, strict=True):
        for long, short in zip(row.split("|")[2:5], here.replace("*", "").split("|")[2:5], strict=True):
            pairs = list(zip(long.split("/"), short.split("/"), strict=True))
            assert all(abs(float(a) - float(b)) <= 0.05 for a, b in pairs), (row, here)
