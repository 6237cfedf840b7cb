"""Write rows as CSV, Markdown and PNG."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import groupby
from pathlib import Path

from lightning_revlib.bench import timing
from lightning_revlib.bench.cell import OURS, Row
from lightning_revlib.nn.meter import format_bytes


def write_csv(path: Path, rows: Sequence[Row], head: Mapping[str, str]) -> None:
    """Write a line for each row; `head` is repeated in each line, so that files can be concatenated."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*[f.name for f in fields(Row)], *head])
        writer.writeheader()
        writer.writerows({**asdict(row), **head} for row in rows)


def markdown(title: str, head: Mapping[str, str], sections: Iterable[str]) -> str:
    """Return a Markdown document."""
    lines = [f"# {title}", "", *[f"- {key}: {value}" for key, value in head.items()], ""]
    return "\n".join(lines) + "\n" + "\n\n".join(sections) + "\n"


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and whose other columns are figures."""
    rule = "|---" + "|---:" * (len(columns) - 1) + "|"
    return "\n".join(["| " + " | ".join(columns) + " |", rule, *["| " + " | ".join(line) + " |" for line in lines]])


def cells(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Group rows by cell, under the cell's heading."""
    key = lambda r: f"{r.workload}, depth {r.depth}, width {r.width}, batch {r.batch}"  # noqa: E731
    return [(name, list(group)) for name, group in groupby(rows, key)]


def cell_table(name: str, rows: Sequence[Row]) -> str:
    """Return a cell's section: a table of its contestants, and notes of those that did not run."""
    plain = next((r for r in rows if r.contestant == "plain"), None)
    cuda = any(r.allocated is not None for r in rows)
    columns = ["", "gradients", "held", "peak", *["CUDA's peak"] * cuda, "FLOPs", "step", "of plain", "a second"]
    lines, without = [], []
    for r in rows:
        if r.note:
            without.append(f"{r.contestant}: {r.note}")
            continue
        assert r.error is not None and r.held is not None and r.peak is not None and r.output
        lines.append(
            [
                f"**{r.contestant}**" if r.ours else r.contestant,
                "right" if r.right else f"**off by {r.error:.0e}**",
                f"{r.held / r.output:.2f}",
                f"{r.peak / r.output:.2f}",
                *[format_bytes(r.allocated or 0)] * cuda,
                f"{r.flops / plain.flops:.3f}" if r.flops and plain and plain.flops else "-",
                f"{r.seconds * 1e3:.1f} ms" if r.seconds else "-",
                over_plain(r),
                f"{r.per_second:,.0f}" if r.per_second else "-",
            ]
        )
    unit = rows[0].unit
    columns[-1] = f"{unit} a second"
    rounds = max(r.rounds for r in rows)
    caption = f"Median of {rounds} rounds." if rounds else "Not timed."
    return f"### {name}\n\n{table(columns, lines)}\n\n{' '.join([caption, '; '.join(without)]).strip()}"


def summary(rows: Sequence[Row], times: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Compare ours at minimum memory with the reversible peers, cell by cell; `times` are by cell and contestant."""
    lines = []
    for name, group in cells(rows):
        found = {r.contestant: r for r in group}
        own = found.get(OURS)
        if own is None or own.note or not own.output or own.held is None or own.peak is None:
            continue
        others = [r for r in group if r.reversible and r.right and not r.ours]
        revlib = found.get("RevLib")
        least = min((r.peak for r in others if r.peak), default=None)
        taken = times.get(name, {})
        timed = [r for r in others if r.contestant in taken]
        fastest = min(timed, key=lambda r: r.seconds or 0.0) if timed else None
        lines.append(
            [
                name,
                "right" if own.right else "**wrong**",
                f"{own.held / own.output:.2f}",
                f"{own.peak / revlib.peak:.2f}" if revlib and revlib.peak else "-",
                f"{own.peak / least:.2f}" if least else "-",
                interval(timing.over_fastest(taken[OURS], {r.contestant: taken[r.contestant] for r in timed}))
                + f" {fastest.contestant}"
                if fastest
                else "-",
                f"{own.over_plain:.2f}" if own.over_plain else "-",
            ]
        )
    columns = ["", "gradients", "held over output", "peak over RevLib's", "over the least", "time over the fastest's",
               "over plain's"]  # fmt: skip
    return (
        "## At minimum memory, beside the reversible peers\n\n"
        + table(columns, lines)
        + "\n\nPeers whose gradients are wrong do not count. Times are medians of the ratios within rounds, with an"
        " interval of 95 %; the fastest peer is chosen by the other half of the rounds."
    )


def over_plain(row: Row) -> str:
    """Return the row's step time over plain's, with its interval."""
    found = row.over_plain, row.over_plain_low, row.over_plain_high
    return "-" if found[0] is None else interval(found)  # type: ignore[arg-type]


def interval(found: tuple[float, float, float]) -> str:
    """Return a figure with its interval as text."""
    return f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})"


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Write a PNG of peak bytes against step time over plain's, for each workload's deepest cell with times."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here since it is slow
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    deepest = {r.workload: [r.depth, r.width] for r in sorted(rows, key=lambda r: (r.depth, r.width)) if r.over_plain}
    shown = {name: [r for r in rows if r.workload == name and [r.depth, r.width] == size and r.over_plain]
             for name, size in deepest.items()}  # fmt: skip
    names = list(dict.fromkeys(r.contestant for r in rows))
    marks = {name: (f"C{i % 10}", "osD^vP*X<>dph8"[i % 14]) for i, name in enumerate(names)}
    across = min(3, max(1, len(shown)))
    down = -(-max(1, len(shown)) // across)
    columns = (1, 2, 4)[across - 1]  # of the legend, as wide as the axes
    legend = 0.3 + 0.21 * -(-len(names) // columns)
    figure = Figure(figsize=(4.6 * across, 3.6 * down + legend), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    handles = {}
    for axis, (workload, group) in zip(axes, shown.items(), strict=False):
        for r in group:
            colour, mark = marks[r.contestant]
            assert r.peak is not None
            handles[r.contestant] = axis.scatter(
                r.over_plain, r.peak / 2**20, s=60, color=colour, marker=mark,
                facecolors=colour if r.right else "none", label=r.contestant, zorder=3,
            )  # fmt: skip
        size = group[0]
        axis.set(title=f"{workload}, depth {size.depth}, width {size.width}", xlabel="step time over plain's",
                 ylabel="peak, MiB", yscale="log")  # fmt: skip
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    for axis in axes[len(shown) :]:
        axis.axis("off")
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    figure.savefig(path, dpi=110)
