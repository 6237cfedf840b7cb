"""Callbacks: the swap for those who keep their strategy, and the monitors of memory and drift."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_revlib.nn.convert.swap import Targets, stacks
from lightning_revlib.nn.meter import MemoryMeter
from lightning_revlib.nn.plan.budget import Budget
from lightning_revlib.nn.stacks.options import MemoryBudget
from lightning_revlib.strategies.base import (
    explain_memory,
    make_budget,
    read_targets,
    save_memory_plan,
    swap_module,
    take_memory_figures,
)


class ReversibleCallback(Callback):
    """Swap as `ReversibleStrategy` does, under any other strategy.

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
        # before averages and optimizers see the module
        swap_module(pl_module, self.targets, self._budget(trainer), strict=False)

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        swap_module(pl_module, self.targets, self._budget(trainer))  # what `configure_model` has built since

    def _budget(self, trainer: pl.Trainer) -> Budget | None:
        return self.budget or getattr(trainer.strategy, "budget", None)

    on_fit_start = on_test_start = on_predict_start = _start

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:  # in a fit it would undo what callbacks have changed of stacks
            self._start(trainer, pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        save_memory_plan(checkpoint, self.budget, pl_module)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        take_memory_figures(pl_module, checkpoint.get("memory_figures", {}))

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        explain_memory(exception, pl_module)


class DriftMonitor(Callback):
    """Log `drift/PATH` of each stack: by how much backward's reconstruction of its input is off, relative.

    And `drift/worst`, the largest of them, which the progress bar shows as well, each step. In float32
    expect 1e-7 to 1e-5; the gradient's error is of the same order. If it nears 1e-2, choose a more
    stable coupling or float32 streams.
    """

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        found = {path or "model": m._drift() for path, m in stacks(pl_module).items()}
        drifts = {path: drift.float() for path, drift in found.items() if drift is not None}
        if drifts:
            drifts["worst"] = torch.stack(list(drifts.values())).max()
        for path, drift in drifts.items():
            options: Any = {"prog_bar": path == "worst", "reduce_fx": "max"}
            pl_module.log(f"drift/{path}", drift, on_step=True, on_epoch=False, **options)


class ActivationMemoryMonitor(Callback):
    """Log the bytes that activations take: `activation/held_bytes` after forward, `activation/peak_bytes` in backward.

    Counted at dispatch by `MemoryMeter`, hence exact and the same on every device; what was alive
    before the step (parameters, optimizer, batch) and parameter gradients do not count. A measured
    step is two to four times slower, so that only some are.

    Args:
        every_n_steps: measure the first batch and each n-th after it.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: measure each step with 1, or fewer with more")
        self.every_n_steps = every_n_steps
        self._meter: MemoryMeter | None = None
        self._hooks: list[Any] = []
        self._held = 0
        self._measured: dict[str, int] = {}

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.every_n_steps:
            return
        self._meter = MemoryMeter()
        self._meter.__enter__()
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._meter.forget_gradient))

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._meter is not None:
            self._held = self._meter.live
            self._meter.reset_peak()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._meter is not None:
            self._measured = {"activation/held_bytes": self._held, "activation/peak_bytes": self._meter.peak}
        self._close()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._close()  # a training_step that returned None has had no backward
        for name, value in self._measured.items():
            pl_module.log(name, float(value), prog_bar=True, on_step=True, on_epoch=False, reduce_fx="max")
        self._measured = {}

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._meter is not None:
            self._meter.__exit__(None, None, None)
            self._meter = None
