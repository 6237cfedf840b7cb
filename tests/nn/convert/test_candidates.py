from __future__ import annotations

import copy
import itertools
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib

Output = namedtuple("Output", ["loss", "y"])
BRANCHES = [["norm1", "mix"], ["norm2", "act", "out"]]


class Layer(nn.Module):
    """A pre-norm layer, whose parts are built in another order than they are called."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.norm1, self.norm2, self.act = nn.LayerNorm(width), nn.LayerNorm(width), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        return x + self.out(self.act(self.norm2(x)))


class Parallel(Layer):
    """A layer whose branches both have the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm1(x)) + self.out(self.act(self.norm2(x)))


class Routed(Layer):
    """A layer that sends each row to one of two experts."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        h, y = self.norm2(x), torch.zeros_like(x)
        for i, expert in enumerate((self.out, nn.Sequential(self.act, self.out))):
            rows = ((h[:, 0] > 0).long() == i).nonzero()[:, 0]
            y = y.index_add(0, rows, expert(h[rows]))
        return x + y


class Table(Layer):
    """A layer that reads a table by numbers, as relative positions are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.out.bias[torch.arange(16)]


class Net(nn.Module):
    """A network with a loss, whose layers change their input a little."""

    def __init__(self, layer: type[Layer] = Layer, depth: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([layer() for _ in range(depth)])

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return Output(x.square().mean(), x)


def sample(rows: int = 32) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(1))


def rows_of(report: revlib.Report) -> dict[str, Any]:
    return {row.name: row for row in report.candidates}


def test_candidates_are_measured() -> None:
    lines: list[str] = []
    report = revlib.report(Net(), sample(), progress=lines.append)
    rows = rows_of(report)
    assert len(rows) == 22 and not report.untried and len(lines) == 25
    original, same = rows["the original"], rows["the original, checkpointed"]
    assert original.change == 0 and original.costs.held == report.held_before
    assert same.change < 1e-6 and same.costs.held < 0.4 * original.costs.held
    budgeted = rows["the original, memory_budget=0.6"].costs
    assert same.costs.peak <= budgeted.peak < 0.8 * original.costs.peak and budgeted.flops < same.costs.flops
    assert rows["the original, checkpointed, by branches"].costs.held > 1.8 * same.costs.held
    exact = [rows[f"exact momentum 2^-{k}"] for k in range(1, 7)]
    assert [row.kept_bits for row in exact] == [1, 2, 3, 4, 5, 6]
    assert all(more.change < 0.6 * less.change for less, more in itertools.pairwise(exact))
    measured = [row for row in rows.values() if row.name.startswith("exact") and row.costs]
    assert [row.name.endswith("by branches") for row in measured] == [False, True]
    for row in measured:
        assert row.drift == 0 and row.change <= 0.05 and original.costs.held > 8 * row.costs.held
        less = rows[row.name.replace(f"-{row.kept_bits}", f"-{row.kept_bits - 1}")]
        assert less.change > 0.05 and less.costs is None  # with fewer bits it is another function
    assert rows["midpoint, by branches"].targets == {"layers": {"coupling": "midpoint", "branches": BRANCHES}}


def test_the_best_of_three_aims_can_be_pasted() -> None:
    model, x = Net(), sample(512)  # rows whose steps are too large to be undone at once
    loss, report = model(x).loss, revlib.report(model, x)
    lines = str(report).splitlines()
    same, near, scratch = [lines[i + 1] for i, line in enumerate(lines) if line.startswith("# ")][:3]
    assert [row.kind for row in report.best.values()] == ["same", "near", "scratch"]
    assert "['checkpoint'] * 6" in same and "'grid_bits': 'auto'" in near and "'coupling': 'additive'" in scratch
    for line, row in zip((same, near, scratch), report.best.values(), strict=True):
        twin = copy.deepcopy(model)
        eval(line.removeprefix("lightning_"), {"revlib": revlib, "model": twin})
        twin(x)  # chooses the grid
        assert abs(twin(x).loss - loss).item() == row.change
    strict = revlib.report(model, x, max_change=1e-5)
    assert list(strict.best.values())[1].kind == "same"


def test_branches_that_compute_another_function_are_not_tried() -> None:
    model, x = Net(Parallel), sample()
    assert not any("branches" in row.name for row in revlib.report(model, x).candidates)


def test_a_router_is_given_the_grid() -> None:
    model, x = Net(Routed), sample()
    report = revlib.report(model, x)
    assert report.targets is not None and report.targets["layers"]["grid_bits"] == "auto"  # type: ignore[index,call-overload]
    assert report.stacks[0].drift == 0 and "shapes depend on values in its blocks, as in a router" in str(report)
    assert all("grid_bits" in row.targets["layers"] for row in report.candidates if row.kind != "same")
    indexed = revlib.report(Net(Table), x)
    assert "grid_bits" not in indexed.targets["layers"] and "router" not in str(indexed)  # type: ignore[index,operator]


def test_the_change_of_a_model_without_a_loss() -> None:
    class Plain(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x).y

    model, x = Plain(), sample()
    row = rows_of(revlib.report(model, x))["midpoint"]
    expected = model(x)
    revlib.swap(model, row.targets)
    assert row.change == pytest.approx(((model(x) - expected).norm() / expected.norm()).item(), rel=1e-5)


def test_candidates_are_measured_in_training_mode() -> None:
    model, x = Net().eval(), sample()
    model.layers[0].eval()
    report = revlib.report(model, x)
    assert rows_of(report)["bdia"].change > 0.5  # in evaluation it is the original
    assert not any(m.training for m in model.modules())
    frozen = Net()
    frozen.layers[0].eval()
    revlib.report(frozen, x)
    assert [layer.training for layer in frozen.layers] == [False, True, True, True, True, True]


def test_no_candidate_is_begun_when_the_time_is_over() -> None:
    report = revlib.report(Net(), sample(), seconds=0)
    assert not report.candidates and not report.best and report.stacks
    assert dict(report.untried)["bdia"] == "no time was left" and "  bdia: no time was left" in str(report)


def test_a_candidate_that_fails_is_named() -> None:
    report = revlib.report(Net(), 1e8 * sample())
    assert "finds no grid" in dict(report.untried)["exact momentum 2^-1"]
    assert rows_of(report)["the original, checkpointed"].costs and "momentum 2^-1: layers: the streams" in str(report)


class Sizes(nn.Module):
    def forward(self, name: str) -> float:
        return {"mix": 0.5}[name]


class Helped(Layer):
    """A layer with a module beside its branches, which takes no stream."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = Sizes()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x)) * self.sizes("mix")
        return x + self.out(self.act(self.norm2(x)))


def test_a_wrong_guess_of_branches_may_raise_any_error() -> None:
    assert not any("branches" in name for name in rows_of(revlib.report(Net(Helped), sample())))


def test_a_terminal_shows_one_line_of_progress(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    revlib.report(Net(), sample())
    assert not capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    revlib.report(Net(), sample())
    shown = capsys.readouterr().err
    assert "\rbdia: forward" in shown.replace("\x1b[K", "") and "\n" not in shown and shown.endswith("\r\x1b[K")


def test_nothing_else_is_tried_for_what_is_given() -> None:
    report = revlib.report(Net(), sample(), targets={"layers": {"coupling": "midpoint"}})
    assert not report.candidates and not report.untried and "# " not in str(report)
