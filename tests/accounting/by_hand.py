"""A training step counted by hand, with `MemoryMeter` alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lightning_revlib as revlib


def loss_of(model: Any, batch: Any) -> Tensor:
    if hasattr(model, "training_step"):
        return model.training_step(batch, 0)
    return model(**batch).loss if isinstance(batch, dict) else model(batch).sum()


def by_hand(model: nn.Module, batch: Any, steps: torch.optim.Optimizer) -> list[int]:
    """Return what `MemoryMeter` counts at the four moments of the third step."""
    for _ in range(3):
        with revlib.MemoryMeter() as meter:
            loss = loss_of(model, batch)
            held = meter.live
            meter.reset_peak()
            loss.backward()
            backward = meter.peak
            meter.reset_peak()
            steps.step()
            optimized = meter.peak
            steps.zero_grad()
            del loss
            figures = [held, backward, optimized, meter.live]
    return figures
