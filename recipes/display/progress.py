"""Lightning's rich progress bar, with metrics that fit beside it on a line of 80 characters."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich.progress import BarColumn, TextColumn

from lightning_revlib.nn.meter import format_bytes


class ProgressBar(RichProgressBar):
    """Show `val/...`, the drift, and the activations held in a readable unit; loggers have all metrics."""

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate, theme=RichProgressBarTheme(metrics_format=".3g"))

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Return the columns of the bar: the epoch, the bar and the number of batches."""
        return [
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        ]

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return the metrics beside the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        shown = {name: value for name, value in metrics.items() if name.startswith("val/")}
        if (drift := metrics.get("drift/worst")) is not None:
            shown["drift"] = drift
        if (held := metrics.get("activation/held_bytes")) is not None:
            shown["held"] = format_bytes(int(held))  # type: ignore[arg-type]
        return shown
