"""The panel with which a command closes: what was found, and where it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from omegaconf import DictConfig
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_revlib.nn.report import Report, format_bytes

Row: TypeAlias = tuple[str, str]


def show(title: str, rows: Sequence[Row]) -> None:
    """Print rows of names and values in a frame; paths are never cut, so that they can be copied."""
    table = Table.grid(padding=(0, 2))
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    Console().print(Panel(table, title=title, title_align="left", expand=False))


def training_rows(
    metrics: Mapping[str, float], found: Report, drift: Any, seconds: float, best: str | None, cfg: DictConfig
) -> list[Row]:
    """What `revlib train` reports. `found` is measured on one batch, with one forward and backward of each kind."""
    held = f"{format_bytes(found.held_before)} by ordinary autograd, {format_bytes(found.held_after)} reversible"
    peak = f"{format_bytes(found.peak_before)} by ordinary autograd, {format_bytes(found.peak_after)} reversible"
    return [
        ("held-out accuracy", f"{metrics['test/acc']:.2%}"),
        ("activations held", f"{held} (x {found.held_before / found.held_after:.1f} less)"),
        ("peak in backward", f"{peak} (x {found.peak_before / found.peak_after:.1f} less)"),
        ("drift", "none: ordinary autograd rebuilds nothing" if drift is None else f"{float(drift):.1e} (relative)"),
        ("training", f"{seconds:.1f} s"),
        ("logs", str(cfg.paths.output_dir)),
        ("best checkpoint", best or "none kept"),
    ]
