"""The table that closes a sweep: what differed between its runs, and the results of each."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_revlib.recipes.commands.run import RESULTS


class SweepTable(Callback):
    """Print a row for each run of a sweep, whichever launcher and sweeper ran it."""

    former: Mapping[Path, float] = {}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note what an earlier sweep has left in the folder."""
        folder = Path(config.hydra.sweep.dir)
        self.former = {file: file.stat().st_mtime for file in folder.glob(f"*/{RESULTS}")}

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Read what the runs have left in the sweep's folder."""
        folder = Path(config.hydra.sweep.dir)
        found = sorted(folder.glob(f"*/{RESULTS}"), key=lambda file: (len(file.parent.name), file.parent.name))
        new = [file for file in found if self.former.get(file) != file.stat().st_mtime]
        runs = {file.parent: json.loads(file.read_text()) for file in new}
        if runs:
            show_sweep(folder, runs, config.get("optimized_metric"))


def show_sweep(folder: Path, runs: dict[Path, dict[str, float]], optimized: str | None) -> None:
    """Print the table: the overrides that are not the same in all runs, `optimized`, and the held-out metrics."""
    chosen = {run: _overrides(run) for run in runs}
    keys = list(dict.fromkeys(key for values in chosen.values() for key in values))
    varied = [key for key in keys if len({values.get(key) for values in chosen.values()}) > 1]
    metrics = dict.fromkeys(name for metrics in runs.values() for name in metrics if name.startswith("test/"))
    columns = [*dict.fromkeys([*([optimized] if optimized else []), *metrics])]
    print(f"{len(runs)} runs in {os.path.relpath(folder)}")  # outside of the table, which may be narrower
    table = Table()
    for name in ("run", *varied):
        table.add_column(name, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")
    for run, results in runs.items():
        cells = [f"{results[name]:.4g}" if name in results else "" for name in columns]
        table.add_row(run.name, *(chosen[run].get(key, "") for key in varied), *cells)
    Console().print(table)


def _overrides(run: Path) -> dict[str, str]:
    """Return the overrides with which a run was started, by key."""
    file = run / ".hydra/overrides.yaml"
    words: Any = OmegaConf.load(file) if file.exists() else []
    return {key: value for key, _, value in (str(word).partition("=") for word in words)}
