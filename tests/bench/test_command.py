"""`revlib bench` as a user meets it."""

from __future__ import annotations

import csv
import os
import platform

import pytest
import torch
from torch import nn

from lightning_revlib.bench import allocator, command, sweep
from lightning_revlib.bench.cell import cell
from lightning_revlib.bench.contestants import CONTESTANTS
from lightning_revlib.bench.workloads import WORKLOADS, Size
from lightning_revlib.cli.main import main

TINY = ["workloads=mlp", "depths=4", "widths=8", "batch=4", "seconds=0.01", "hydra.run.dir=out"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def test_tables_figures_and_a_picture_are_written(folder, capsys):
    assert main(["bench", *TINY]) == 0
    assert "At minimum memory" in capsys.readouterr().out
    rows = list(csv.DictReader((folder / "bench.csv").open()))
    assert [row["contestant"] for row in rows] == [c.name for c in CONTESTANTS]
    assert all(row["seed"] == "0" and row["commit"] and row["date"] and row["machine"] for row in rows)
    assert float(next(row for row in rows if row["contestant"] == "plain")["per_second"]) > 0
    text = (folder / "bench.md").read_text()
    for word in (
        "### mlp, depth 4, width 8, batch 4",
        "| plain | right |",
        "torch " + torch.__version__,
        "not measured",
    ):
        assert word in text
    assert (folder / "bench.png").stat().st_size > 5_000


def test_missing_peers_are_listed(folder, monkeypatch):
    monkeypatch.setattr(type(CONTESTANTS[0]), "installed", property(lambda self: self.package != "revlib"))
    assert main(["bench", *TINY, "contestants=[plain,RevLib]"]) == 0
    text = (folder / "bench.md").read_text()
    assert "- not installed: RevLib" in text and "RevLib: not installed" in text


def test_an_interrupted_run_keeps_its_cells(folder, monkeypatch):
    def interrupted(workload, size, *args, **options):
        if size.depth == 8:
            raise KeyboardInterrupt
        return cell(workload, size, *args, **options)

    monkeypatch.setattr(command, "cell", interrupted)
    assert main(["bench", *TINY, "depths=[4,8]", "contestants=[plain]", "seconds=0"]) == 130
    assert "### mlp, depth 4, width 8" in (folder / "bench.md").read_text()
    assert len(list(csv.DictReader((folder / "bench.csv").open()))) == 1


@pytest.mark.parametrize("given", [[], ["seconds=0.5"]])
def test_the_quick_mode_shares_its_span_among_cells(folder, monkeypatch, given):
    seconds = []

    def noted(*args, **named):
        seconds.append(named["seconds"])
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "cell", noted)
    assert main(["bench", "workloads=mlp", "depths=[4,8]", "contestants=[plain]", *given]) == 130
    assert seconds == [0.5] if given else seconds[0] == pytest.approx(command.SPAN["quick"] / 4, rel=0.05)


def test_counts_alone_need_no_times(folder):
    assert main(["bench", *TINY, "seconds=0", "contestants=[plain,lightning_revlib]"]) == 0
    assert "Not timed." in (folder / "bench.md").read_text()


def test_a_sweep_of_budgets_writes_tables_and_a_picture(folder, capsys):
    sizes = ["workloads=mlp", "depths=4", "widths=16", "batch=8", "seconds=0"]
    assert main(["bench", "sweep=true", "budgets=2", *sizes, "hydra.run.dir=out"]) == 0
    assert "| budget | peak |" in capsys.readouterr().out
    assert "| checkpoint, selective | right |" in (folder / "sweep.md").read_text()
    assert (folder / "sweep.csv").exists() and (folder / "sweep-mlp-depth4-width16-batch8.png").stat().st_size > 5_000


def test_a_sweep_is_never_over_its_budgets_and_never_does_more_work():
    curve = sweep.of_workload(WORKLOADS["transformer"], Size(8, 16, 2), torch.device("cpu"), 3, 0, 0)
    for point in curve.points:
        assert point.fits and point.row.right
        assert point.fewest is None or point.row.flops <= point.fewest.flops
    assert curve.points[0].budget < curve.points[-1].budget == curve.plain.peak


def test_a_recipe_can_be_swept(folder, monkeypatch, capsys):
    monkeypatch.setattr(sweep.timing, "times", lambda modules, *args, **named: {name: [1.0] * 3 for name in modules})
    arguments = ["recipe=momentumnet", "depth=3", "budget_sweep=true", "budgets=2", "batch_size=2"]
    assert main(["report", *arguments, "hydra.run.dir=out"]) == 0
    assert "| budget | peak |" in capsys.readouterr().out
    assert (folder / "sweep-MomentumNet-batch2.png").exists()
    assert "report recipe=momentumnet" in (folder / "sweep.md").read_text()


def test_a_budget_is_shared_by_the_stacks_of_a_model():
    model = nn.Sequential(WORKLOADS["mlp"].stack(Size(4, 16, 0)), nn.Tanh(), WORKLOADS["mlp"].stack(Size(4, 16, 0)))
    curve = sweep.sweep("two", model, torch.randn(64, 32, requires_grad=True), budgets=2, seconds=0)
    assert all(point.fits and point.row.right for point in curve.points)
    with pytest.raises(ValueError, match="two has no stack"):
        sweep.sweep("two", nn.Linear(2, 2), torch.randn(1, 2))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["workloads=mpl"], "workloads=['mpl']: unknown; take some of mlp, conv"),
        (["contestants=[plain,other]"], "contestants=['other']"),
        (["device=tpu"], "device=tpu: take auto, cpu or cuda"),
        (["depths=0"], "depths=0: pass whole numbers of 1 or more"),
        (["sweep=true", "budgets=1", "depths=4"], "budgets=1: pass 2 or more"),
        (["threads=0"], "threads=0: pass whole numbers of 1 or more"),
        (["workloads=transformer", "widths=66"], "widths=66: 4 heads need a multiple of 4"),
        (["workloads=reformer", "widths=66"], "widths=66: 4 heads"),
        (
            ["workloads=irevnet", "widths=3"],
            "widths=3: i-RevNet's inner convolutions have a quarter of the width; pass 4 or more",
        ),
        (["seconds=-1"], "seconds=-1: pass 0 or more"),
    ],
)
def test_errors_name_key_value_and_way_out(given, said, capsys):
    assert main(["bench", *TINY[:1], *given, "hydra.run.dir=out"]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")
def test_the_allocator_is_fixed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execve", lambda program, words, environment: calls.append(environment))
    for name in allocator.ALLOCATOR:
        monkeypatch.delenv(name, raising=False)
    allocator.fix_allocator()
    assert calls[0]["MALLOC_MMAP_THRESHOLD_"] == str(2**32)
    for name in allocator.ALLOCATOR:
        monkeypatch.setenv(name, "1")
    allocator.fix_allocator()
    assert len(calls) == 1
