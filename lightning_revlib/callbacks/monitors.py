"""Callbacks that log what a training costs: bytes of activations, drift of the inversion, samples per second."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_revlib.callbacks.every import check_every_n_steps
from lightning_revlib.nn.convert.swap import stacks
from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.meter import ActivationMeter


class DriftMonitor(Callback):
    """Log `drift/PATH` of each stack: the relative error with which backward rebuilds the stack's input.

    `drift/worst` is the largest of them; the progress bar shows it in each step. In float32
    expect 1e-7 to 1e-5; the gradient's error is of the same order. If the drift is near 1e-2, choose a more
    stable coupling, float32 streams or `grid_bits`.
    """

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # `stack.drift` would wait for the device in each step
        found = {path or "model": stack.drift_on_device() for path, stack in stacks(pl_module).items()}
        drifts = {path: drift.float() for path, drift in found.items() if drift is not None}
        if drifts:
            drifts["worst"] = torch.stack(list(drifts.values())).max()
        for path, drift in drifts.items():
            options: Any = {"prog_bar": path == "worst", "reduce_fx": "max"}
            pl_module.log(f"drift/{path}", drift, on_step=True, on_epoch=False, **options)


class ActivationMemoryMonitor(Callback):
    """Log the bytes that activations take: `activation/held_bytes` after forward, `activation/peak_bytes` in backward.

    The progress bar shows them as `activation/held_MiB` and `activation/peak_MiB`.
    `MemoryMeter` counts them at dispatch, so that they are exact and the same on every device. Parameters, the
    optimizer's state, the batch and parameter gradients do not count. A measured step is two to four times
    slower; therefore only some steps are measured.

    Args:
        every_n_steps: measure the first batch and each n-th after it.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        check_every_n_steps(every_n_steps)
        self.every_n_steps = every_n_steps
        self._meter: ActivationMeter | None = None  # while a step is measured
        self._cleanup = ExitStack()
        self._held = 0
        self._measured: dict[str, int] = {}

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.every_n_steps:
            return
        self._meter = meter = self._cleanup.enter_context(ActivationMeter())
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(meter.forget_gradient)
                self._cleanup.callback(hook.remove)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._meter is not None:
            self._held = self._meter.live
            self._meter.reset_peak()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._meter is not None:
            self._measured = {"activation/held_bytes": self._held, "activation/peak_bytes": self._meter.peak}
        self._stop()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop()  # a training_step that returned None has had no backward
        for name, value in self._measured.items():
            options: Any = {"on_step": True, "on_epoch": False, "reduce_fx": "max"}
            pl_module.log(name, float(value), **options)
            pl_module.log(name.replace("bytes", "MiB"), value / 2**20, prog_bar=True, logger=False, **options)
        self._measured = {}

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()  # a module's on_train_batch_start may have ended the epoch

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        """Stop measuring, if a step is being measured, and remove the hooks on parameters."""
        self._meter = None
        self._cleanup.close()


class SpeedMonitor(Callback):
    """Log `speed/samples_per_second`, and `speed/tokens_per_second` if a batch holds sequences of whole numbers.

    >>> Trainer(callbacks=[SpeedMonitor(every_n_steps=20)])

    The figures are of all processes together, and include loading but not validation. A sample is an entry of the
    first dimension of a batch's first tensor. Tokens are counted in the batch's first integer tensor of two
    dimensions or more. Lightning's ThroughputMonitor knows FLOPs as well, and writes to loggers only.

    Args:
        every_n_steps: number of batches to average over. The callback waits for the device once in this many batches.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        check_every_n_steps(every_n_steps)
        self.every_n_steps = every_n_steps
        self._open_window()

    def _open_window(self, trainer: Any = None, pl_module: Any = None, *, since: float | None = None) -> None:
        """Begin to count anew, from the time `since` or else from the end of the next batch."""
        self._since = since
        self._steps = self._samples = self._tokens = 0

    on_train_start = on_validation_end = _open_window

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._since is None:
            self._since = _now(pl_module.device)
            return
        tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.ndim]
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
        self._open_window(since=now)


def _now(device: torch.device) -> float:
    """Return the time, after the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
