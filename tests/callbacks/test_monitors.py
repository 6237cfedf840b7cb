"""The monitors log bytes, drift and speed, and leave nothing behind."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_revlib as revlib
from tests.strategies.helpers import Net, data, trainer


def logged(tmp_path: Path, **options: Any) -> tuple[Net, Any, str]:
    net, logger = Net(), CSVLogger(tmp_path, name="", version="")
    callbacks = [revlib.ActivationMemoryMonitor(every_n_steps=3), revlib.DriftMonitor()]
    run = trainer(tmp_path, callbacks=callbacks, logger=logger, log_every_n_steps=1, **options)
    run.fit(net, data())
    return net, run, (tmp_path / "metrics.csv").read_text()


def test_monitors_reach_the_logger_and_the_progress_bar(tmp_path: Path) -> None:
    _, run, csv = logged(tmp_path, strategy="reversible")
    names = {"drift/worst", "activation/held_bytes", "activation/peak_bytes"}
    assert names <= set(csv.splitlines()[0].split(","))
    shown = run.progress_bar_metrics
    assert {"drift/worst", "activation/held_MiB", "activation/peak_MiB"} <= set(shown) and "MiB" not in csv
    assert shown["activation/held_MiB"] == pytest.approx(run.callback_metrics["activation/held_bytes"].item() / 2**20)
    assert 0 < run.callback_metrics["drift/worst"] < 1e-5
    assert run.callback_metrics["drift/net"] == run.callback_metrics["drift/worst"]


def test_memory_without_gradients_is_flat_and_below_the_stock_strategy(tmp_path: Path) -> None:
    figures = {}
    for strategy in ("auto", "reversible"):
        _, run, _ = logged(tmp_path / strategy, strategy=strategy, max_epochs=1)
        figures[strategy] = [int(run.callback_metrics[f"activation/{name}_bytes"]) for name in ("held", "peak")]
    batch, width = 8, 16
    assert figures["reversible"][0] < 8 * batch * width * 4
    assert figures["reversible"][0] < 0.5 * figures["auto"][0]


def test_weights_that_fsdp_gathers_are_parameters(tmp_path: Path) -> None:
    from torch.distributed import fsdp  # noqa: F401  # has the operator

    class Gathers(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.weight = torch.empty(100)
            torch.ops.fsdp.split_with_sizes_copy(torch.ones(2, 50), [50], dim=1, out=[self.weight.view(2, 50)])
            return super().training_step(batch, batch_idx)

    held = []
    for cls in (Net, Gathers):
        run = trainer(tmp_path, strategy="reversible", callbacks=[revlib.ActivationMemoryMonitor(1)], max_epochs=1)
        run.fit(cls(), data())
        held.append(run.callback_metrics["activation/held_bytes"])
    assert held[0] == held[1]


def meters() -> set[revlib.MemoryMeter]:
    """Return the meters that are alive, such as an active one, or one that a parameter's hook belongs to."""
    gc.collect()
    return {each for each in gc.get_objects() if issubclass(type(each), revlib.MemoryMeter)}


def test_a_failed_step_leaves_no_meter_behind(tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("no step")

    before, monitor = meters(), revlib.ActivationMemoryMonitor()
    with pytest.raises(RuntimeError, match="no step"):
        trainer(tmp_path, callbacks=[monitor]).fit(Fails(), data())
    assert meters() <= before


def test_skipped_steps_are_passed_over(tmp_path: Path) -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    before, monitor = meters(), revlib.ActivationMemoryMonitor(1)
    run = trainer(tmp_path, callbacks=[monitor, revlib.DriftMonitor()], max_epochs=1)
    run.fit(Skips(), data())
    assert meters() <= before and not run.callback_metrics


@pytest.mark.parametrize("monitor", [revlib.ActivationMemoryMonitor, revlib.MemoryBreakdown])
def test_an_epoch_that_its_module_ends_leaves_no_meter_active(monitor: Any, tmp_path: Path) -> None:
    class Ends(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 1 else None

    trainer(tmp_path, callbacks=[monitor(1)], max_epochs=1).fit(Ends(), data())
    before = {meter: meter.live for meter in meters()}
    new = torch.ones(1000)
    assert {meter: meter.live for meter in meters()} == before and new.numel() == 1000


def test_every_n_steps_is_checked() -> None:
    with pytest.raises(ValueError, match="every_n_steps='3': pass a number of batches"):
        revlib.ActivationMemoryMonitor("3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every_n_steps=0"):
        revlib.ActivationMemoryMonitor(0)


def test_speed_in_samples_and_tokens(tmp_path: Path) -> None:
    class Words(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step([batch[0].float()], batch_idx)

    words = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(48, 8).long()), batch_size=8)
    run = trainer(tmp_path, strategy="reversible", callbacks=[revlib.SpeedMonitor(2)], max_epochs=1)
    run.fit(Words(), words)
    samples, tokens = (run.callback_metrics[f"speed/{what}_per_second"] for what in ("samples", "tokens"))
    assert samples > 0 and tokens == pytest.approx(8 * samples)
    with pytest.raises(ValueError, match="every_n_steps=0"):
        revlib.SpeedMonitor(0)
