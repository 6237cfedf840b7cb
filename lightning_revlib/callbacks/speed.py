"""The speed of a training, as metrics of the Trainer."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override


class SpeedMonitor(Callback):
    """Log `speed/samples_per_second`, and `speed/tokens_per_second` where a batch holds sequences of whole numbers.

    >>> Trainer(callbacks=[SpeedMonitor(every_n_steps=20)])

    Of all processes together, loading included and validation not. A sample is an entry of the first
    dimension of a batch's first tensor; tokens are counted in its first integer tensor of two
    dimensions or more. Lightning's ThroughputMonitor knows FLOPs as well, and writes to loggers only.

    Args:
        every_n_steps: over how many batches to average; the device is waited for once in so many.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}: average over one step or more")
        self.every_n_steps = every_n_steps
        self._begin()

    def _begin(self, trainer: Any = None, pl_module: Any = None) -> None:
        self._since: float | None = None
        self._steps = self._samples = self._tokens = 0

    on_train_start = on_validation_end = _begin

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._since is None:  # the window opens with the end of a batch
            self._since = _now(pl_module.device)
            return
        tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.ndim]
        tokens = [t.numel() for t in tensors if t.ndim > 1 and not t.is_floating_point() and t.dtype is not torch.bool]
        self._steps += 1
        self._samples += len(tensors[0]) if tensors else 1
        self._tokens += tokens[0] if tokens else 0
        if self._steps < self.every_n_steps:
            return
        now = _now(pl_module.device)
        for name, count in (("samples", self._samples), ("tokens", self._tokens)):
            if count:
                rate = count * trainer.world_size / max(now - self._since, 1e-9)
                pl_module.log(f"speed/{name}_per_second", rate, on_step=True, on_epoch=False)
        self._begin()
        self._since = now


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
