"""Draw the curves of a training as a PNG beside the table of its metrics."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger

from lightning_revlib.recipes.display.picture import save

STAGES = {"train": ("C0", "-", "o"), "val": ("C1", "--", "s"), "test": ("C2", "", "D")}  # colour, line and marker
UNITS = {"loss": "loss, nats", "acc": "share of right answers", "bpb": "bits per byte"}


def draw_curves(loggers: Sequence[Any]) -> Path | None:
    """Write `curves.png` beside `metrics.csv`, if there is one: an axis for each metric, a line for each stage."""
    folder = next((Path(logger.log_dir) for logger in loggers if isinstance(logger, CSVLogger)), None)
    curves = read_curves(folder / "metrics.csv") if folder is not None and (folder / "metrics.csv").exists() else {}
    if folder is None or not curves:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here since it is slow
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(curves), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (metric, stages) in zip(figure.subplots(1, len(curves), squeeze=False).flat, curves.items(), strict=True):
        for stage, points in sorted(stages.items(), key=lambda item: list(STAGES).index(item[0])):
            color, line, marker = STAGES[stage]
            shape = marker if len(points) == 1 else None
            axis.plot(*zip(*points, strict=True), label=stage, color=color, linestyle=line, marker=shape)
        axis.set(xlabel="epoch", ylabel=UNITS.get(metric, metric), title=metric)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    return save(figure, folder / "curves.png")


def read_curves(table: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return the points (epoch, value) of a table of Lightning's CSVLogger, by metric and stage.

    After the training, the best checkpoint is validated and tested in an epoch of its own. The validation is left out,
    since it is there already, and the test stands at the last epoch.
    """
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                stage, _, metric = name.partition("/")
                if value and row.get("epoch") and stage in STAGES:
                    curves.setdefault(metric, {}).setdefault(stage, []).append((float(row["epoch"]), float(value)))
    trained = [epoch for stages in curves.values() for epoch, _ in stages.get("train", [])]
    for stages in curves.values():
        if trained and "val" in stages:
            stages["val"] = [point for point in stages["val"] if point[0] <= max(trained)]
        if trained and "test" in stages:
            stages["test"] = [(min(epoch, max(trained)), value) for epoch, value in stages["test"]]
    return {metric: stages for metric, stages in curves.items() if set(stages) != {"test"}}
