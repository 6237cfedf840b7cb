"""A callback that logs where the memory of a training step goes, and tells it when memory runs out."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_revlib.accounting.advice import advise
from lightning_revlib.accounting.recorder import Recorder
from lightning_revlib.accounting.result import Advice, Memory
from lightning_revlib.accounting.step import program_of
from lightning_revlib.callbacks.every import check_every_n_steps
from lightning_revlib.nn.internals import pytree
from lightning_revlib.nn.plan.unshard import fsdp_modules
from lightning_revlib.strategies.setup import is_out_of_memory


class MemoryBreakdown(Callback):
    """Log the bytes of a training step by owner: `memory/in_backward/parameters`, `.../gradients` and so on.

    >>> Trainer(callbacks=[MemoryBreakdown(every_n_steps=200)])

    There are four moments: `after_forward`, `in_backward`, `in_the_optimizer` and `between_steps`, of the two in the
    middle the highest; `memory/highest` is that of the whole step. `memory` is the last measured step, a `Memory`:
    print it, or draw it by `callback.memory.plot("step.png")`. If a later step runs out of memory, the error has its
    table, and the changes that would save most, counted by simulation.
    A measured step is two to four times slower; other steps cost nothing.

    Args:
        every_n_steps: measure the second batch of an epoch, when the optimizer has its state, and each n-th after it.
        picture: a .png file to draw each measured step into.

    Raises:
        ValueError: for an `every_n_steps` below 1.
    """

    def __init__(self, every_n_steps: int = 100, picture: str | None = None) -> None:
        check_every_n_steps(every_n_steps)
        self.every_n_steps, self.picture = every_n_steps, picture
        self.memory: Memory | None = None  # of the last measured step
        self._recorder: Recorder | None = None  # while a step is measured
        self._shapes: Any = None  # of its batch, without memory
        self._cleanup = ExitStack()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx - 1) % self.every_n_steps == 0:
            self._recorder = self._cleanup.enter_context(Recorder(pl_module, batch, *trainer.optimizers))
            self._shapes = pytree.tree_map_only(Tensor, partial(torch.empty_like, device="meta"), batch)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._recorder is not None:
            self._recorder.end("forward")

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._recorder is not None:
            self._recorder.end("backward")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        recorder = self._recorder
        if recorder is None:
            return
        recorder.end("optimizer")
        self._stop()
        if not recorder.is_complete:  # training_step returned None
            return
        self.memory = recorder.result()
        for name, value in self.memory.to_dict().items():
            pl_module.log(name, value, on_step=True, on_epoch=False)
        if self.picture is not None and trainer.is_global_zero:
            self.memory.plot(self.picture, f"step {trainer.global_step}")

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()  # a module's on_train_batch_start may have ended the epoch

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()
        if self.memory is not None and is_out_of_memory(exception):
            found = dataclasses.replace(self.memory, advice=self._advise(trainer, pl_module, self.memory))
            exception.args = (f"{exception}\nthe last measured step:\n{found}", *exception.args[1:])

    def _advise(self, trainer: pl.Trainer, module: Any, memory: Memory) -> tuple[Advice, ...]:
        """Return what would save most of the measured step, which is simulated outside of the Trainer.

        It is nothing under FSDP2, which the error has left in the midst of a step.
        """
        if fsdp_modules(module):
            return ()
        optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
        program = program_of(module, self._shapes, optimizer, None)
        module.trainer = None  # what the step logs goes nowhere
        try:
            with trainer.precision_plugin.forward_context():
                return advise(program, memory, module.device)
        except Exception:  # of a step that cannot run by itself; the error to tell is another
            return ()
        finally:
            module.trainer = trainer

    def _stop(self) -> None:
        """Stop measuring, if a step is being measured."""
        self._recorder = None
        self._cleanup.close()
