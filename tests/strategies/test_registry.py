"""The names of strategies: when they are registered, and what each stands for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_revlib.strategies.registry import NAMES
from tests.strategies.helpers import trainer


def test_lightning_cli_knows_short_names() -> None:
    pytest.importorskip("jsonargparse")
    code = """
import lightning_revlib
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
given = ["--trainer.strategy=ReversibleStrategy", "--trainer.callbacks+=DriftMonitor"]
given += ["--trainer.callbacks+=SpeedMonitor", "--trainer.callbacks.every_n_steps=7"]
cpu = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.logger=false"]
cli = LightningCLI(BoringModel, run=False, save_config_callback=None, args=given + cpu)
assert type(cli.trainer.strategy).__name__ == "ReversibleStrategy"
drift, speed = cli.trainer.callbacks[:2]
assert type(drift).__name__ == "DriftMonitor" and speed.every_n_steps == 7
options = ["--trainer.strategy.class_path=ReversibleStrategy", "--trainer.strategy.init_args.restore=true"]
assert LightningCLI(BoringModel, run=False, save_config_callback=None, args=options + cpu).trainer.strategy.restore
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [name for name in NAMES if "deepspeed" not in name])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_name_stands_for_a_class(tmp_path: Path, name: str, devices: int) -> None:
    cls = NAMES[name][0].split(".")[1]
    distributed = "ReversibleDDPStrategy" if cls == "ReversibleStrategy" else cls
    strategy = trainer(tmp_path, strategy=name, devices=devices).strategy
    assert type(strategy).__name__ == (cls if devices == 1 else distributed)
    assert strategy.world_size == devices


def test_deepspeed_has_a_name_for_each_stage() -> None:
    found = {name: arguments for name, (_, arguments) in NAMES.items() if "deepspeed_" in name}
    offload = {"offload_optimizer": True}
    assert found == {
        "reversible_deepspeed_stage_1": {"stage": 1},
        "reversible_deepspeed_stage_1_offload": {"stage": 1, **offload},
        "reversible_deepspeed_stage_2": {"stage": 2},
        "reversible_deepspeed_stage_2_offload": {"stage": 2, **offload},
        "reversible_deepspeed_stage_3": {"stage": 3},
        "reversible_deepspeed_stage_3_offload": {"stage": 3, **offload, "offload_parameters": True},
    }
