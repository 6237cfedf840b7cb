"""Optimizer and learning rate schedule of all recipes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import lightning as L
import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

OptimizerFactory: TypeAlias = Callable[[Any], torch.optim.Optimizer]
SchedulerFactory: TypeAlias = Callable[..., LRScheduler]


class RecipeModule(L.LightningModule):
    """Base of the recipes' modules, which get their optimizer and schedule as arguments.

    Args:
        optimizer: called with the parameters; default SGD, lr 0.01, momentum 0.9.
        scheduler: called with the optimizer; default none. A scheduler that takes `total_steps`, such as OneCycleLR,
            gets their number and steps after each batch, any other scheduler after each epoch.
    """

    def __init__(self, optimizer: OptimizerFactory | None = None, scheduler: SchedulerFactory | None = None) -> None:
        super().__init__()
        self._optimizer, self._scheduler = optimizer, scheduler

    def configure_optimizers(self) -> Any:
        make = self._optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9))
        optimizer = _build("optimizer", make, self.parameters())
        if self._scheduler is None:
            return optimizer
        if "total_steps" in inspect.signature(self._scheduler).parameters:
            scheduler = self._planned(self._scheduler, optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        return {"optimizer": optimizer, "lr_scheduler": _build("scheduler", self._scheduler, optimizer)}

    def _planned(self, make: SchedulerFactory, optimizer: torch.optim.Optimizer) -> LRScheduler:
        """Return a schedule for all steps of the run; ValueError if training has no end and the schedule needs one."""
        if not math.isinf(steps := self.trainer.estimated_stepping_batches):
            return _build("scheduler", make, optimizer, total_steps=int(steps))
        try:
            return make(optimizer, total_steps=None)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"max_epochs=-1: training has no end, and the learning rate's schedule needs one ({error}); set"
                " max_epochs or max_steps, or take a schedule without an end, such as scheduler=warmup_rsqrt"
            ) from error

    def on_train_start(self) -> None:
        steps = self.trainer.estimated_stepping_batches
        for config in self.trainer.lr_scheduler_configs:  # restored from the checkpoint of a run that is resumed
            if (planned := getattr(config.scheduler, "total_steps", steps)) < steps:
                raise ValueError(
                    f"the checkpoint's learning rate was planned for {planned} steps, and this run has {steps}: a cycle"
                    " cannot be prolonged; keep max_epochs, or start a new training"
                )


def _build(name: str, make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a factory; an error says whose values are wrong, which torch's messages do not."""
    try:
        return make(*args, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={getattr(make, 'keywords', make)}: {error}") from error


def warmup_rsqrt(optimizer: torch.optim.Optimizer, *, warmup: int, total_steps: int | None = None) -> LambdaLR:
    """Return a schedule that rises to the optimizer's rate over `warmup` steps, then falls with their square root.

    rate(t) = lr min((t + 1) / warmup, sqrt(warmup / (t + 1))). The schedule needs no end and ignores `total_steps`.
    Raises ValueError if `warmup` is less than 1.
    """
    if warmup < 1:
        raise ValueError(f"warmup={warmup}: pass 1 or more; with 1 the rate falls from the first step")
    return LambdaLR(optimizer, lambda step: min((step + 1) / warmup, (warmup / (step + 1)) ** 0.5))
