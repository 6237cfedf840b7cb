"""A strategy for one device becomes one for several, unless it is a subclass."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.plugins.environments import SLURMEnvironment

import lightning_revlib as revlib
from tests.strategies.helpers import fit, trainer


class Mine(revlib.ReversibleStrategy):
    pass


class MineForSeveral(Mine):
    distributed_class = revlib.ReversibleDDPStrategy


def test_a_subclass_is_for_one_device(tmp_path: Path) -> None:
    fit(tmp_path, Mine(), max_epochs=1)
    with pytest.raises(TypeError, match="Mine is a subclass of ReversibleStrategy and so for one device; for several"):
        trainer(tmp_path, strategy=Mine(), devices=2)


def test_a_subclass_may_name_its_class_for_several(tmp_path: Path) -> None:
    assert type(trainer(tmp_path, strategy=MineForSeveral(), devices=2).strategy) is revlib.ReversibleDDPStrategy


def test_slurm_as_a_plugin_outside_of_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = SLURMEnvironment(auto_requeue=False)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    fit(tmp_path, "reversible", max_epochs=1, plugins=[slurm])
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # an interactive job, in which Python is started by hand
    assert type(trainer(tmp_path, strategy="reversible", plugins=[slurm]).strategy) is revlib.ReversibleStrategy


def test_the_object_stays_when_its_class_changes(tmp_path: Path) -> None:
    strategy = revlib.ReversibleStrategy(memory_budget=0.5)
    run = trainer(tmp_path, strategy=strategy, devices=2, num_nodes=2)
    assert run.strategy is strategy and isinstance(strategy, revlib.ReversibleDDPStrategy)
    assert strategy.world_size == 4 and strategy.budget is not None and strategy.budget.value == 0.5
