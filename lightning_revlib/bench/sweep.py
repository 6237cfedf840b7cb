"""Measure memory against time: budgets between the least peak and plain training's, beside the other contestants.

At each budget the best of the others is the one with the fewest FLOPs, or the shortest step, among those that fit in
the same bytes and have right gradients.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_revlib.bench import measure, tables, timing
from lightning_revlib.bench.cell import Row, examine, execute, plan_of
from lightning_revlib.bench.contestants import CONTESTANTS, Contestant, checkpointed, ours
from lightning_revlib.bench.workloads import Size, Workload
from lightning_revlib.nn import CoupledSequential
from lightning_revlib.nn.plan.solver import Plan

RIVALS = [c for c in CONTESTANTS if c.name in ("plain", "save_on_cpu", "RevLib")] + [
    Contestant("checkpoint", checkpointed()),
    *[Contestant(f"checkpoint, every {n}", checkpointed(every=k)) for k, n in ((2, "2nd"), (3, "3rd"), (4, "4th"))],
    *[Contestant(f"checkpoint, {k} blocks at a time", checkpointed(segment=k)) for k in (2, 4)],
    Contestant("checkpoint, root of N", checkpointed(segment=None)),
    Contestant("checkpoint, selective", checkpointed(selective=True)),
]
PLAIN, LEAST = RIVALS[0], "lightning_revlib"


@dataclass
class Point:
    """Ours at one budget, and the best of the others that fit in the budget."""

    budget: int
    row: Row
    plan: str
    fewest: Row | None = None
    fastest: Row | None = None
    ratio: tuple[float, float, float] | None = None  # step time over the fastest's, with its interval

    @property
    def fits(self) -> bool:
        """Return whether the peak is within the budget."""
        return self.row.peak is not None and self.row.peak <= self.budget

    @property
    def holds(self) -> bool:
        """Return whether ours fits, is right, takes the fewest FLOPs or as few, and is not slower beyond the noise."""
        own, least = self.row.flops, None if self.fewest is None else self.fewest.flops
        return (
            self.fits
            and self.row.right
            and (least is None or (own is not None and own <= least))
            and (self.ratio is None or self.ratio[1] <= 1)
        )


@dataclass
class Curve:
    """The points of one model, with the rows of the others."""

    name: str
    rows: list[Row]  # the others, and ours at the least peak
    points: list[Point]
    rounds: int

    @property
    def plain(self) -> Row:
        """Return the row of ordinary autograd."""
        return next(r for r in self.rows if r.contestant == "plain")


def of_workload(workload: Workload, size: Size, device: torch.device, budgets: int, seconds: float, seed: int) -> Curve:
    """Return the curve of one of the benchmark's stacks."""
    torch.manual_seed(seed)
    stack, x = workload.stack(size).to(device), workload.input(size, device=device, requires_grad=True)
    name = f"{workload.name}-depth{size.depth}-width{size.width}-batch{size.batch}"
    return sweep(name, stack, x, budgets=budgets, seconds=seconds, seed=seed)


def sweep(name: str, model: nn.Module, x: Tensor, *, budgets: int = 10, seconds: float = 30.0, seed: int = 0) -> Curve:
    """Measure the model at `budgets` budgets and the others once, with steps in turns.

    Raises ValueError for fewer than two budgets, and for a model without a stack.
    """
    if not isinstance(budgets, int) or budgets < 2:
        raise ValueError(f"budgets={budgets!r}: pass 2 or more")
    bench = _Entries(name, model, x)
    for rival in RIVALS:
        bench.enter(rival)
    least, plain = bench.enter(Contestant(LEAST, ours, "lightning_revlib", True)), bench.rows["plain"]
    if least.peak is None or plain.peak is None:
        raise ValueError(f"{name}: {least.note or plain.note}")
    # A plan is for the stacks, and a budget below its minimum is refused: `outside` is what the model takes besides.
    whole = execute(Contestant("", ours, budget=1.0), model, bench.draws)
    measure.step(whole, x)
    plan = plan_of(whole)
    outside = 0 if isinstance(model, CoupledSequential) else max(0, plain.peak - plan.plain, least.peak - plan.minimum)
    low, high = max(least.peak, plan.minimum + outside), plain.peak
    points = []
    for index in range(budgets):
        budget = low + (high - low) * index // (budgets - 1)
        label = f"budget {index + 1}"
        row = bench.enter(Contestant(label, ours, "lightning_revlib", budget=budget - outside))
        if row.note:
            raise ValueError(f"{name}, memory_budget={budget - outside}: {row.note}")
        points.append(Point(budget, row, summarise(plan_of(bench.modules[label]))))
    times = bench.time(seconds, seed)
    rivals = [bench.rows[c.name] for c in RIVALS if bench.rows[c.name].right]
    for point in points:
        fitting = [r for r in rivals if r.peak is not None and r.peak <= point.budget]
        if fitting:
            point.fewest = min(fitting, key=lambda r: r.flops or 0)
            point.fastest = min(fitting, key=lambda r: r.over_plain or 0.0)
            point.ratio = timing.ratio(times[point.row.contestant], times[point.fastest.contestant])
    return Curve(name, [bench.rows[name] for name in (*[c.name for c in RIVALS], LEAST)], points, len(times["plain"]))


class _Entries:
    """The contestants that run one model: their rows, and the modules that are timed.

    Raises ValueError for a model without a stack.
    """

    def __init__(self, name: str, model: nn.Module, x: Tensor) -> None:
        self.steps = sum(len(m) for m in model.modules() if isinstance(m, CoupledSequential))
        if not self.steps:
            raise ValueError(f"{name} has no stack: a budget chooses how the blocks of a CoupledSequential are run")
        self.name, self.model, self.x = name, model, x
        state = torch.get_rng_state()
        measure.step(execute(PLAIN, model, True), x)
        self.draws = not torch.equal(torch.get_rng_state(), state)
        self.small = (x[:2].double() if x.is_floating_point() else x[:2]).detach().requires_grad_(x.requires_grad)
        self.reference = measure.gradients(execute(PLAIN, model, self.draws, torch.float64), self.small)
        self.rows: dict[str, Row] = {}
        self.modules: dict[str, nn.Module] = {}

    def enter(self, contestant: Contestant) -> Row:
        """Measure a contestant's error, bytes and FLOPs."""
        x, version = self.x, contestant.version
        row = Row(self.name, self.steps, x.shape[-1], len(x), contestant.name, version, str(x.device), str(x.dtype))
        module = examine(row, contestant, self.model, x, self.small, self.reference, self.draws)
        if module is not None:
            self.modules[contestant.name] = module
        self.rows[contestant.name] = row
        return row

    def time(self, seconds: float, seed: int) -> dict[str, list[float]]:
        """Time all modules in turns, and fill in their rows."""
        times = timing.times(self.modules, self.x, seconds, seed, rounds=(3, 100))
        for key, taken in times.items():
            row = self.rows[key]
            row.seconds = statistics.median(taken)
            row.over_plain, row.over_plain_low, row.over_plain_high = timing.ratio(taken, times["plain"])
        return times


def summarise(plan: Plan) -> str:
    """Return the number of blocks under each treatment, as text."""
    counts = Counter(treatment for treatments in plan.treatments.values() for treatment in treatments)
    return ", ".join(f"{count} {treatment}" for treatment, count in counts.items())


def show(curve: Curve) -> str:
    """Return the curve as Markdown: a table of the budgets, and one of the others."""
    lines = []
    for p in curve.points:
        fewest = f"{_over(p.fewest, curve)} {p.fewest.contestant}" if p.fewest else "none fits"
        fastest = "none fits"
        if p.fastest:
            fastest = f"{p.fastest.over_plain:.2f} {p.fastest.contestant}, {_over(p.fastest, curve)}"
        lines.append(
            [
                _mib(p.budget),
                _mib(p.row.peak) + ("" if p.fits else " **over**"),
                p.plan,
                _over(p.row, curve),
                fewest,
                f"{p.row.over_plain:.2f}",
                fastest,
                "{:.2f} ({:.2f} to {:.2f})".format(*p.ratio) if p.ratio else "-",
                "yes" if p.holds else "**no**",
            ]
        )
    columns = [
        "budget",
        "peak",
        "plan",
        "FLOPs",
        "fewest that fit",
        "step",
        "fastest that fits, its FLOPs",
        "step over its",
        "holds",
    ]
    others = [
        [r.contestant, "right" if r.right else f"**off by {r.error:.0e}**", _mib(r.peak),
         _over(r, curve), tables.over_plain(r)]
        for r in curve.rows
        if r.peak is not None and r.flops is not None and r.error is not None
    ]  # fmt: skip
    notes = "; ".join(f"{r.contestant}: {r.note}" for r in curve.rows if r.note)
    return "\n\n".join(
        [
            f"### {curve.name}",
            tables.table(columns, lines),
            tables.table(["", "gradients", "peak", "FLOPs", "step"], others),
            f"MiB; FLOPs and steps over plain's, medians of {curve.rounds} rounds with an interval of 95 %. A budget"
            " holds if the peak is within it, gradients are right, FLOPs are the fewest or equal, and the interval"
            f" does not lie above 1. {notes}".rstrip(),
        ]
    )


def _over(row: Row, curve: Curve) -> str:
    """Return the row's FLOPs over plain's."""
    return f"{row.flops / curve.plain.flops:.3f}" if row.flops and curve.plain.flops else "-"


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.2f}"


def draw(path: Path, curve: Curve) -> None:
    """Write a PNG of peak bytes against step time and against FLOPs, both over plain's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here since it is slow
    from matplotlib.figure import Figure

    assert curve.plain.flops
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axis, label in ((left, "step time over plain's"), (right, "FLOPs over plain's")):
        timed = axis is left
        value = lambda r, timed=timed: r.over_plain if timed else r.flops / curve.plain.flops  # noqa: E731
        own = [p.row for p in curve.points]
        axis.plot([r.peak / 2**20 for r in own if r.peak], [value(r) for r in own if r.peak], "-o", color="C3",
                  label="lightning_revlib, by budget", zorder=4)  # fmt: skip
        for index, r in enumerate(r for r in curve.rows if r.peak is not None and r.contestant != LEAST):
            assert r.peak is not None
            axis.scatter(r.peak / 2**20, value(r), marker="sD^vP*X<>dph8"[index % 13], s=60, label=r.contestant,
                         facecolors=f"C{index % 10}" if r.right else "none", edgecolors=f"C{index % 10}")  # fmt: skip
        axis.set(xlabel="peak, MiB", ylabel=label, xlim=(0, None))
        axis.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(curve.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def write(folder: Path, curves: Sequence[Curve], head: Mapping[str, str]) -> None:
    """Write sweep.md, sweep.csv and a picture for each curve, and print their names."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for curve in curves for row in (*curve.rows, *[p.row for p in curve.points])]
    tables.write_csv(folder / "sweep.csv", rows, head)
    (folder / "sweep.md").write_text(tables.markdown("Budgets", head, map(show, curves)))
    paths = [folder / "sweep.md", folder / "sweep.csv"]
    for curve in curves:
        paths.append(folder / f"sweep-{curve.name}.png")
        draw(paths[-1], curve)
    print("\n".join(os.path.relpath(path) for path in paths))
