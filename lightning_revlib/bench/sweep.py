"""The curve of memory against time: ten budgets between the least and what plain training takes, beside the others.

At each budget the best of the others is the one that takes the fewest FLOPs, or the shortest step, among
those that fit in the same bytes with right gradients.
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
    """Ours at one budget, and the best of the others that fit in it."""

    budget: int
    row: Row
    plan: str
    fewest: Row | None = None
    fastest: Row | None = None
    ratio: tuple[float, float, float] | None = None  # of step times, to the fastest's

    @property
    def fits(self) -> bool:
        return self.row.peak is not None and self.row.peak <= self.budget

    @property
    def holds(self) -> bool:
        """In budget, right, with as few FLOPs, and not slower beyond the noise."""
        own, least = self.row.flops, None if self.fewest is None else self.fewest.flops
        return (
            self.fits
            and self.row.right
            and (least is None or (own is not None and own <= least))
            and (self.ratio is None or self.ratio[1] <= 1)
        )


@dataclass
class Curve:
    name: str
    rows: list[Row]  # of the others, and of ours at the least
    points: list[Point]
    rounds: int

    @property
    def plain(self) -> Row:
        return next(r for r in self.rows if r.contestant == "plain")


def of_workload(workload: Workload, size: Size, device: torch.device, budgets: int, seconds: float, seed: int) -> Curve:
    """The curve of one of the benchmark's stacks."""
    torch.manual_seed(seed)
    stack, x = workload.stack(size).to(device), workload.input(size, device=device, requires_grad=True)
    name = f"{workload.name}-depth{size.depth}-width{size.width}-batch{size.batch}"
    return sweep(name, stack, x, budgets=budgets, seconds=seconds, seed=seed)


def sweep(name: str, model: nn.Module, x: Tensor, *, budgets: int = 10, seconds: float = 30.0, seed: int = 0) -> Curve:
    """Measure the model at so many budgets, and the others once; all take turns with their steps.

    Raises ValueError for less than two budgets, and for a model without a stack.
    """
    if not isinstance(budgets, int) or budgets < 2:
        raise ValueError(f"budgets={budgets!r}: pass 2 or more")
    steps = sum(len(m) for m in model.modules() if isinstance(m, CoupledSequential))
    if not steps:
        raise ValueError(f"{name} has no stack: a budget chooses how the blocks of a CoupledSequential are run")
    state = torch.get_rng_state()
    measure.step(execute(PLAIN, model, True), x)
    draws = not torch.equal(torch.get_rng_state(), state)
    small = (x[:2].double() if x.is_floating_point() else x[:2]).detach().requires_grad_(x.requires_grad)
    reference = measure.gradients(execute(PLAIN, model, draws, torch.float64), small)
    rows: dict[str, Row] = {}
    modules: dict[str, nn.Module] = {}

    def enter(contestant: Contestant) -> Row:
        row = Row(name, steps, x.shape[-1], len(x), contestant.name, contestant.version, str(x.device), str(x.dtype))
        module = examine(row, contestant, model, x, small, reference, draws)
        if module is not None:
            modules[contestant.name] = module
        rows[contestant.name] = row
        return row

    for rival in RIVALS:
        enter(rival)
    least, plain = enter(Contestant(LEAST, ours, "lightning_revlib", True)), rows["plain"]
    if least.peak is None or plain.peak is None:
        raise ValueError(f"{name}: {least.note or plain.note}")
    # What the model takes beside its stacks, whose plan this is; and a budget below the plan's minimum is refused.
    whole = execute(Contestant("", ours, budget=1.0), model, draws)
    measure.step(whole, x)
    plan = plan_of(whole)
    outside = 0 if isinstance(model, CoupledSequential) else max(0, plain.peak - plan.plain, least.peak - plan.minimum)
    low, high = max(least.peak, plan.minimum + outside), plain.peak
    points = []
    for index in range(budgets):
        budget = low + (high - low) * index // (budgets - 1)
        label = f"budget {index + 1}"
        row = enter(Contestant(label, ours, "lightning_revlib", budget=budget - outside))
        if row.note:
            raise ValueError(f"{name}, memory_budget={budget - outside}: {row.note}")
        points.append(Point(budget, row, summarise(plan_of(modules[label]))))
    times = timing.times(modules, x, seconds, seed, rounds=(3, 100))
    for key, taken in times.items():
        rows[key].seconds = statistics.median(taken)
        rows[key].over_plain, rows[key].over_plain_low, rows[key].over_plain_high = timing.ratio(taken, times["plain"])
    rivals = [rows[c.name] for c in RIVALS if rows[c.name].right]
    for point in points:
        fitting = [r for r in rivals if r.peak is not None and r.peak <= point.budget]
        if fitting:
            point.fewest = min(fitting, key=lambda r: r.flops or 0)
            point.fastest = min(fitting, key=lambda r: r.over_plain or 0.0)
            point.ratio = timing.ratio(times[point.row.contestant], times[point.fastest.contestant])
    return Curve(name, [rows[c.name] for c in RIVALS] + [rows[LEAST]], points, len(times["plain"]))


def summarise(plan: Plan) -> str:
    """How many blocks have which treatment."""
    counts = Counter(treatment for treatments in plan.treatments.values() for treatment in treatments)
    return ", ".join(f"{count} {treatment}" for treatment, count in counts.items())


def show(curve: Curve) -> str:
    """The curve as Markdown: the budgets with the check of each, and the others."""
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
            f"MiB; FLOPs and steps over plain's, medians of {curve.rounds} rounds with an interval of 95 %. It holds if"
            " the peak is in the budget, gradients are right, FLOPs are the fewest or equal, and the interval does not"
            f" lie above 1. {notes}".rstrip(),
        ]
    )


def _over(row: Row, curve: Curve) -> str:
    """Its FLOPs over plain's."""
    return f"{row.flops / curve.plain.flops:.3f}" if row.flops and curve.plain.flops else "-"


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.2f}"


def draw(path: Path, curve: Curve) -> None:
    """A PNG: peak bytes against step time, and against FLOPs, over plain's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
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
    """sweep.md, sweep.csv and a picture for each curve; their names are printed."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for curve in curves for row in (*curve.rows, *[p.row for p in curve.points])]
    tables.write_csv(folder / "sweep.csv", rows, head)
    (folder / "sweep.md").write_text(tables.markdown("Budgets", head, map(show, curves)))
    paths = [folder / "sweep.md", folder / "sweep.csv"]
    for curve in curves:
        paths.append(folder / f"sweep-{curve.name}.png")
        draw(paths[-1], curve)
    print("\n".join(os.path.relpath(path) for path in paths))
