"""Train recipes under both strategies from one seed: their losses, and the activation bytes of each.

    revlib bench study=recipes
    revlib bench study=recipes experiments=[reformer_topics] 'overrides=["threads=1","trainer.max_epochs=1"]'

By default the experiments whose data are bundled, for two epochs. Bytes are `ActivationMemoryMonitor`'s, of one batch.
In float64 the losses must be equal. In float32 training magnifies differences by rounding.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

MIB = 2**20


class Training(NamedTuple):
    """The losses of a training, and the activation bytes held after forward and at the peak of backward."""

    losses: list[float]
    held: float
    peak: float


def train(experiment: str, strategy: str, overrides: Sequence[str]) -> Training:
    """Run `revlib train` in a process of its own, which leaves this one's Hydra and seeds as they are."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"experiment={experiment}", f"strategy={strategy}", "logger=csv", f"hydra.run.dir={folder}"]
        command = [sys.executable, "-m", "lightning_revlib.cli.main", "train", *fixed, *overrides]
        environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(done.stderr.strip().removeprefix("revlib: "))
        with (Path(folder) / "csv/metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
    losses = [float(row[key]) for row in rows for key in ("train/loss", "val/loss", "test/loss") if row.get(key)]
    held, peak = (max(float(row.get(f"activation/{key}_bytes") or 0) for row in rows) for key in ("held", "peak"))
    return Training(losses, held, peak)


def main(
    *,
    experiments: Sequence[str] = ("irevnet_digits", "momentumnet_digits"),
    overrides: Sequence[str] = ("trainer.max_epochs=2",),
) -> None:
    """Print a row for each experiment; `overrides` are those of `revlib train`."""
    print("| experiment | test loss in float64: auto, reversible | apart at most | in float32 | MiB held | at peak |")
    print("|---|---|---|---|---|---|")
    for experiment in experiments:
        single, double = (
            [train(experiment, s, [*overrides, f"+trainer.precision={precision}"]) for s in ("auto", "reversible")]
            for precision in ("32-true", "64-true")
        )
        apart = [
            max(abs(a - b) / abs(a) for a, b in zip(auto.losses, reversible.losses, strict=True))
            for auto, reversible in (double, single)
        ]
        losses = ", ".join(f"{one.losses[-1]:.8f}" for one in double)
        held, peak = (
            ", ".join(f"{each / MIB:.2f}" for each in pair) for pair in zip(*[t[1:] for t in single], strict=True)
        )
        print(f"| {experiment} | {losses} | {apart[0]:.0e} | {apart[1]:.0e} | {held} | {peak} |", flush=True)
