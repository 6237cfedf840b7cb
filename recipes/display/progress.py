"""Lightning's rich progress bar, with the loss, the speed and the time that is left of the whole training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from rich import get_console
from rich.progress import BarColumn, TextColumn


class ProgressBar(RichProgressBar):
    """Show loss, `val/...`, drift, the MiB of activations held, steps per second and the time left.

    The time left is that of all epochs, with their validation. Loggers have all metrics. Without a terminal or a
    notebook there is no bar: a file or a pipe would get its last state only, after a wait of up to a second.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        if not isinstance(refresh_rate, int) or refresh_rate < 0:
            raise ValueError(f"refresh_rate={refresh_rate}: pass the number of batches between refreshes, 0 for no bar")
        super().__init__(refresh_rate=refresh_rate, theme=RichProgressBarTheme(metrics_format=".3g"))
        self._loss: Any = None  # of the last batch, on its device
        self._begin = (0.0, 0)  # when the training began, and after which step

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not (get_console().is_terminal or get_console().is_jupyter):
            self.disable()

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Return the columns of the bar: the epoch, the bar and the number of batches."""
        return [
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin = (time.perf_counter(), trainer.global_step)
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return the metrics beside the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        shown: dict[str, Any] = {} if self._loss is None else {"loss": float(self._loss)}
        shown |= {name: value for name, value in metrics.items() if name.startswith("val/")}
        begin, before = self._begin
        if (done := trainer.global_step - before) > 0:
            rate, total = done / (time.perf_counter() - begin), trainer.estimated_stepping_batches
            shown["steps/s"] = rate
            if total != float("inf"):
                shown["left"] = str(timedelta(seconds=round((total - trainer.global_step) / rate)))
        if (drift := metrics.get("drift/worst")) is not None:
            shown["drift"] = drift
        if (held := metrics.get("activation/held_MiB")) is not None:
            shown["held"] = f"{float(held):.3g} MiB"  # type: ignore[arg-type]
        return shown
