"""The callback that swaps stacks for those who keep their strategy."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from lightning_revlib.strategies.saved_targets import KEY, save_targets, take_grids
from lightning_revlib.strategies.setup import (
    Budget,
    MemoryBudget,
    Targets,
    explain_memory,
    make_budget,
    read_targets,
    save_memory_plan,
    swap_module,
    swap_new,
    take_memory_figures,
)


class ReversibleCallback(Callback):
    """Swap the LightningModule's stacks as `ReversibleStrategy` does, under any other strategy.

    >>> Trainer(strategy="ddp", callbacks=[ReversibleCallback()])

    Args:
        targets, memory_budget: as in `ReversibleStrategy`.

    Raises:
        ValueError: when a run starts with nothing to swap or with a wrong target.
    """

    def __init__(self, targets: Targets | None = None, *, memory_budget: MemoryBudget | None = None) -> None:
        self.targets, self.budget = read_targets(targets), make_budget(memory_budget)

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # before weight averaging and optimizers see the module
        swap_module(pl_module, self.targets, self._find_budget(trainer), strict=False)

    def _swap(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap again, for stacks that `configure_model` has built since `setup`."""
        swap_module(pl_module, self.targets, self._find_budget(trainer))

    def _find_budget(self, trainer: pl.Trainer) -> Budget | None:
        """Return the budget of this callback, or else that of a reversible strategy beside it."""
        return self.budget or getattr(trainer.strategy, "budget", None)

    on_fit_start = on_test_start = on_predict_start = _swap

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # of each epoch, in which hooks may have assigned a stack
            swap_new(pl_module, self.targets, self._find_budget(trainer))

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # within a fit, keep what other callbacks have changed of stacks
            self._swap(trainer, pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        save_memory_plan(checkpoint, self.budget, pl_module)
        save_targets(checkpoint, pl_module)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        take_grids(pl_module, checkpoint.get(KEY, {}))
        take_memory_figures(pl_module, checkpoint.get("memory_figures", {}))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        explain_memory(exception, pl_module)
