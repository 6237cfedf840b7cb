"""The metrics beside the progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rich

import lightning_revlib as revlib
from lightning_revlib.recipes.display.progress import ProgressBar
from tests.strategies.helpers import Net, data, trainer


class Recording(ProgressBar):
    """Keep what was shown last."""

    shown: dict[str, Any]

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        self.shown = super().get_metrics(*args)
        return self.shown


def test_loss_speed_and_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # by which rich takes what it writes to for a terminal
    rich.reconfigure()  # rich 13 has looked at it when it made its console
    bar = Recording()
    callbacks = [bar, revlib.ActivationMemoryMonitor(), revlib.DriftMonitor()]
    trainer(tmp_path, strategy="reversible", callbacks=callbacks, enable_progress_bar=True).fit(Net(), data())
    assert {"loss", "drift", "held", "steps/s", "left"} <= set(bar.shown)
    assert bar.shown["held"].endswith(" MiB") and bar.shown["left"] == "0:00:00" and bar.shown["steps/s"] > 0


def test_a_pipe_gets_no_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    rich.reconfigure()
    trainer(tmp_path, strategy="reversible", callbacks=[ProgressBar()], enable_progress_bar=True).fit(Net(), data())
    assert "Epoch" not in capsys.readouterr().out
