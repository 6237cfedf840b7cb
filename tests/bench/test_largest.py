"""`revlib bench largest=...`, by counting."""

from __future__ import annotations

import pytest
import torch

from lightning_revlib.bench.largest import most, read_limit
from lightning_revlib.cli.main import main


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("weights", [0, 5000])
@pytest.mark.parametrize("right", [0, 1, 2, 7, 100, 12_345])
def test_the_largest_number_is_found_to_a_sixteenth(right: int, weights: int, ends: bool) -> None:
    asked: list[int] = []

    def bytes_of(n: int) -> int:
        asked.append(n)
        return 1 << 62 if ends and n > right else 1000 * (weights + n) + (n > 1000 and 200 * n)

    found = most(bytes_of, bytes_of(right))
    assert found <= right <= found + max(1, found // 16) and len(asked) < 20


def test_reversible_stacks_fit_more(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    compared = "contestants=[plain,lightning_revlib,'lightning_revlib, feed-forward in 4 chunks']"
    sizes = ["device=cpu", "widths=16", "depths=2", "lengths=128", "hydra.run.dir=out"]
    assert main(["bench", "largest=512KiB", compared, *sizes]) == 0
    text = (tmp_path / "out" / "largest.md").read_text()
    assert "The largest in 512.0 KiB, width 16" in capsys.readouterr().out
    rows = {r.split("|")[1].strip(): [int(n.replace(",", "")) for n in r.split("|")[2:4]] for r in _lines(text)}
    plain, ours = rows["plain"], rows["lightning_revlib"]
    assert ours[0] > 3 * plain[0] and ours[1] > plain[1] > 0
    assert rows["lightning_revlib, feed-forward in 4 chunks"][1] >= ours[1]


@pytest.mark.parametrize(
    ("asked", "column"), [("lengths=64", "blocks, of 64 tokens"), ("depths=2", "tokens, in 2 blocks")]
)
def test_only_the_named_size_is_searched(tmp_path, asked, column) -> None:
    sizes = ["largest=128KiB", "device=cpu", "widths=16", "contestants=plain", f"hydra.run.dir={tmp_path}"]
    assert main(["bench", *sizes, asked]) == 0
    assert f"|  | {column} |" in (tmp_path / "largest.md").read_text()


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if (line.startswith("| ") and "lightning" in line) or "| plain" in line]


def test_limits() -> None:
    cpu = torch.device("cpu")
    assert read_limit("2GiB", cpu) == 2 << 30 and read_limit(True, cpu) == 32 << 20
    for value in ("auto", 0.5, -3, "much"):
        with pytest.raises(ValueError, match=r"largest=.*pass bytes, such as 2GiB, or true"):
            read_limit(value, cpu)
