"""Recipes under both strategies from one seed: losses side by side, and the activation bytes of both.

    python benchmarks/recipes.py [experiment ...] [key=value ...]

By default the experiments whose data are bundled, for two epochs; bytes are `ActivationMemoryMonitor`'s, of one batch.
In float64 the losses are to be the same; in float32 training magnifies what rounding makes different.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from lightning_revlib.cli.main import main

EXPERIMENTS = ["irevnet_digits", "momentumnet_digits"]
MIB = 2**20


def run(experiment: str, strategy: str, overrides: list[str]) -> tuple[list[float], float, float]:
    """All losses logged, and the bytes held after forward and at the peak of backward."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        fixed = [f"experiment={experiment}", f"strategy={strategy}", "logger=csv", f"hydra.run.dir={folder}"]
        if main(["train", *fixed, *overrides]):
            raise SystemExit(1)
        rows = list(csv.DictReader((Path(folder) / "csv/metrics.csv").open()))
    losses = [float(row[key]) for row in rows for key in ("train/loss", "val/loss", "test/loss") if row.get(key)]
    held, peak = (max(float(row[f"activation/{key}_bytes"] or 0) for row in rows) for key in ("held", "peak"))
    return losses, held, peak


if __name__ == "__main__":
    overrides = [word for word in sys.argv[1:] if "=" in word] or ["trainer.max_epochs=2"]
    print("| experiment | test loss in float64: auto, reversible | apart at most | in float32 | MiB held | at peak |")
    print("|---|---|---|---|---|---|")
    for experiment in [word for word in sys.argv[1:] if "=" not in word] or EXPERIMENTS:
        apart = []
        for precision in ("32-true", "64-true"):
            both = [run(experiment, s, [*overrides, f"+trainer.precision={precision}"]) for s in ("auto", "reversible")]
            apart.append(max(abs(a - b) / abs(a) for a, b in zip(both[0][0], both[1][0], strict=True)))
            if precision == "32-true":
                held, peak = (", ".join(f"{one[i] / MIB:.2f}" for one in both) for i in (1, 2))
        losses = ", ".join(f"{one[0][-1]:.8f}" for one in both)
        print(f"| {experiment} | {losses} | {apart[1]:.0e} | {apart[0]:.0e} | {held} | {peak} |", flush=True)
