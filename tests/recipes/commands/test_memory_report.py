"""`revlib report`: memory against depth."""

from __future__ import annotations

import pytest

from lightning_revlib.cli.main import main
from lightning_revlib.recipes.commands.memory_report import measure
from lightning_revlib.recipes.models.irevnet import IRevNetModule

SMALL = {"shape": (1, 8, 8), "channels": (16, 64), "strides": (1, 2), "initial_psi": 2}


def test_reversible_memory_does_not_grow_with_depth_and_the_others_does():
    points = [measure(IRevNetModule(**SMALL, depth=depth), depth, 4) for depth in (2, 4, 6)]
    assert [point.steps for point in points] == [5, 9, 13]
    assert len({point.bytes["reversible"][0] for point in points}) == 1
    for way in ("plain", "checkpointed"):
        one, two, three = (point.bytes[way][0] for point in points)
        assert two - one == three - two > 0
    assert all(p.bytes["plain"] > p.bytes["checkpointed"] > p.bytes["reversible"] for p in points)


@pytest.mark.parametrize("recipe", ["irevnet", "momentumnet"])
def test_report_prints_a_table_and_draws_it(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", f"recipe={recipe}", "depths=[2,3]", "batch_size=2", "picture=deep/memory.png"]) == 0
    out = capsys.readouterr().out
    assert "checkpointed" in out and "picture: deep/memory.png" in out
    assert (tmp_path / "deep/memory.png").stat().st_size > 10_000


def test_a_report_is_of_the_configured_precision(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    held = {}
    for precision in ("32-true", "64-true", "bf16-mixed"):
        assert main(["report", "depths=[2]", "batch_size=2", f"precision={precision}"]) == 0
        (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ 2 ")]
        held[precision] = float(row.split("│")[3].split("/")[0])
    assert held["64-true"] == pytest.approx(2 * held["32-true"], rel=0.02)
    assert held["bf16-mixed"] > held["32-true"]  # casts of weights, of which a small batch has more than activations


def test_the_published_networks_are_measured_without_their_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["experiment=irevnet_imagenet", "~data", "depths=[1,[2,1,1,1]]", "batch_size=1"]
    assert main(["report", *arguments, "+recipe.shape=[3,64,64]", "+recipe.classes=5"]) == 0
    assert "[2, 1, 1, 1]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("depths=0", "depth=0: each stage needs a block"),
        ("depths=[]", "depths=[]: give one depth or more"),
        ("batch_size=no", "batch_size=no: pass a whole number"),
    ],
)
def test_errors(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", argv]) == 1
    assert message in capsys.readouterr().err
