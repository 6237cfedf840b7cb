"""The picture of a step: its bytes over its allocations, stacked by owner, with the four moments and the peak."""

from __future__ import annotations

from pathlib import Path

from lightning_revlib.accounting.curve import Curve

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def draw(curve: Curve, title: str, path: Path) -> Path:
    """Write a figure on white, which is legible on light and dark pages, and return its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here since it is slow
    from matplotlib.figure import Figure

    power = max(0, (max(curve.totals).bit_length() - 1) // 10)
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    colors = [f"C{n}" for n in range(10)] + ["#444444", "#bbbbbb", "#e0c060"]
    sizes = [[size / 1024**power for size in row] for row in curve.rows.values()]
    axis.stackplot(curve.times, sizes, labels=list(curve.rows), colors=colors[: len(sizes)], step="post")
    for end in curve.ends.values():
        axis.axvline(end, color="black", linewidth=0.8, linestyle=":")
    top = max(curve.totals) / 1024**power
    begin = 0
    for part, end in curve.ends.items():
        axis.text((begin + end) / 2, 1.12 * top, part, ha="center", va="center")
        begin = end
    side = ("left", "center", "right")[min(2, 3 * curve.peak_time // max(1, *curve.times))]  # within the axes
    axis.annotate(curve.peak, (curve.peak_time, top), (0, 6), textcoords="offset points", ha=side, fontsize=8)
    axis.plot([curve.peak_time], [top], "v", color="black", markersize=6)
    axis.set(
        xlabel="allocations and frees of the step, in their order", ylabel=f"memory, {UNITS[power]}", title=title,
        xlim=(0, max(1, *curve.times)), ylim=(0, 1.2 * top),
    )  # fmt: skip
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white")
    return path
