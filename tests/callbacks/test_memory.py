"""The breakdown of a training step reaches the logger, and the error of a step that runs out of memory."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_revlib as revlib
from tests.strategies.helpers import Net, data, trainer

MOMENTS = ["after_forward", "in_backward", "in_the_optimizer", "between_steps"]


def meters() -> int:
    """Return the number of meters that are alive."""
    gc.collect()
    return sum(isinstance(each, revlib.MemoryMeter) for each in gc.get_objects())


def test_bytes_by_owner_reach_the_logger(tmp_path: Path) -> None:
    net, logger = Net(), CSVLogger(tmp_path, name="", version="")
    before, callback = meters(), revlib.MemoryBreakdown(every_n_steps=2, picture=str(tmp_path / "step.png"))
    run = trainer(tmp_path, callbacks=[callback], logger=logger, log_every_n_steps=1, strategy="reversible")
    run.fit(net, data())
    values, parameters = run.callback_metrics, sum(p.nbytes for p in net.parameters())
    for moment in MOMENTS:
        owners = {n: v for n, v in values.items() if n.startswith(f"memory/{moment}/") and not n.endswith("total")}
        assert sum(owners.values()) == values[f"memory/{moment}/total"]
        assert owners[f"memory/{moment}/parameters"] == parameters
    assert values["memory/in_the_optimizer/gradients"] == parameters
    assert "memory/highest" in (tmp_path / "metrics.csv").read_text()
    assert callback.memory is not None and callback.memory.in_backward.total == values["memory/in_backward/total"]
    assert (tmp_path / "step.png").is_file()
    assert meters() == before


@pytest.mark.parametrize("late", [False, True])
def test_running_out_of_memory_tells_the_last_measured_step(late: bool, tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == (3 if late else 0):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().training_step(batch, batch_idx)

    before = meters()
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught:
        trainer(tmp_path, callbacks=[revlib.MemoryBreakdown(every_n_steps=1)], strategy="reversible").fit(
            Fails(), data()
        )
    assert ("the last measured step:\n" in str(caught.value)) == late
    assert ("highest in backward" in str(caught.value)) == late
    assert ("# split the batch in two: saves " in str(caught.value)) == late
    assert meters() == before


def test_skipped_steps_are_passed_over(tmp_path: Path) -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    run = trainer(tmp_path, callbacks=[revlib.MemoryBreakdown(1)], max_epochs=1)
    run.fit(Skips(), data())
    assert not run.callback_metrics


def test_every_n_steps_is_checked() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0"):
        revlib.MemoryBreakdown(0)
