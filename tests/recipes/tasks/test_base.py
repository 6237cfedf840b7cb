"""Optimizer and schedule of all recipes."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch

from lightning_revlib.recipes.data.digits import Digits
from lightning_revlib.recipes.models.irevnet import IRevNetModule
from lightning_revlib.recipes.tasks.base import warmup_rsqrt


class Stop(L.Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= 3


def run(scheduler):
    net = {"shape": (1, 8, 8), "channels": (16,), "strides": (1,), "initial_psi": 2, "depth": 1}
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=-1, callbacks=[Stop()], accelerator="cpu", **quiet)
    trainer.fit(IRevNetModule(scheduler=scheduler, **net), Digits())
    return trainer


def test_training_without_an_end_takes_a_schedule_without():
    trainer = run(partial(warmup_rsqrt, warmup=4))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)  # the fourth step's


def test_training_without_an_end_refuses_a_schedule_with():
    with pytest.raises(ValueError, match="max_epochs=-1: training has no end, and the learning rate's schedule needs"):
        run(partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1))


def test_a_warmup_of_no_steps():
    with pytest.raises(ValueError, match="warmup=0: pass 1 or more"):
        warmup_rsqrt(torch.optim.SGD([torch.zeros(1)], lr=1.0), warmup=0)
