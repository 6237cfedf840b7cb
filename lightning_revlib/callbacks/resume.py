"""Exact resumption: a run that resumes from a checkpoint ends with the bits of one that was never interrupted."""

from __future__ import annotations

import random
import warnings
from typing import Any, TypeAlias

import lightning.pytorch as pl
import numpy
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

Module: TypeAlias = pl.LightningModule
KEY = "revlib_resume"  # in the checkpoint


class ExactResume(Callback):
    """Resume from a checkpoint with the random numbers and the batches that would have come next.

    >>> save = ModelCheckpoint(every_n_train_steps=100, save_last=True)
    >>> Trainer(strategy="reversible", callbacks=[save, ExactResume()]).fit(net, data, ckpt_path="last")

    Lightning saves weights, optimizers and counters. Without this callback a resumed run draws other numbers for
    dropout and shuffling, and begins the epoch's batches again. This callback saves the state of each process's random
    generators, the present one and that of the beginning of the epoch. A run that resumes draws the epoch's order
    again, and loads and skips the batches that have been seen. A loader with a `state_dict` of its own (torchdata's
    StatefulDataLoader) is left to Lightning. With this callback, validation does not change training's random numbers.

    On the same machine and with the same number of processes, the final weights equal those of an uninterrupted run to
    the last bit.

    Limits: Lightning takes one batch ahead from a loader that has no length. If its dataset draws random numbers as it
    goes, in the process that trains (num_workers=0), the resumed run draws others; take one worker. What persistent
    workers draw after the first epoch is not restored. With
    precision="64-true" Lightning rounds the loaded weights of a module that is made in float32; make it in float64. It
    also resumes in the midst of an epoch without what GradientAccumulationScheduler has set.

    Warns of a loader whose batches cannot be drawn again, and if the number of processes has changed; the run resumes
    as it would without this callback then.
    """

    def __init__(self) -> None:
        # states of the random generators, as `capture` returns them
        self._epoch: dict[str, Any] = {}  # when the epoch's iterator was made
        self._step: dict[str, Any] | None = None  # after the last batch
        self._now: dict[str, Any] | None = None  # at the checkpoint, for the next epoch of a run that resumes
        self._loaded: Any = None  # this process's part of the checkpoint, until training starts

    @override
    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        finished = progress.ready >= trainer.num_training_batches
        mine = {"epoch": self._epoch, "now": capture(), "batches": 0 if finished else progress.ready}
        everyone: list[Any] = [mine]
        if trainer.world_size > 1:
            everyone = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, mine)
        checkpoint[KEY] = everyone

    @override
    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Module, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get(KEY)
        if states is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if len(states) != trainer.world_size:
            warnings.warn(
                f"the checkpoint is of {len(states)} processes, this run has {trainer.world_size}: random numbers and"
                " batches cannot continue exactly",
                stacklevel=2,
            )
            return
        self._loaded = states[trainer.global_rank]

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: Module) -> None:
        self._epoch, self._step, self._now = capture(), None, None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: Module) -> None:
        combined_loader: Any = trainer.fit_loop._combined_loader
        if any(_draws_by_itself(loader) for loader in combined_loader.flattened):
            warnings.warn(
                "ExactResume: a loader has a generator of its own, whose state no checkpoint has; leave out generator=,"
                " as seed_everything seeds the order of batches",
                stacklevel=2,
            )
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        self._step = loaded["now"]
        if any(hasattr(loader, "load_state_dict") for loader in combined_loader.flattened):
            restore(loaded["now"])
        else:
            self._skip_batches(trainer, loaded["batches"], loaded["epoch"], loaded["now"])

    def _skip_batches(self, trainer: pl.Trainer, count: int, epoch: dict[str, Any], now: dict[str, Any]) -> None:
        """Draw the epoch's order again, and load and skip its first batches."""
        loop: Any = trainer.fit_loop
        for loader in loop._combined_loader.flattened:
            sampler: Any = getattr(loader, "sampler", None)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(loop.epoch_progress.current.processed)
            if getattr(loader, "persistent_workers", False) and not loop.epoch_progress.current.processed:
                loader._iterator = None  # to draw the workers' seed once more; later epochs draw none
        self._epoch = epoch if count else now
        restore(self._epoch)
        if count or not _makes_iterator(trainer):
            iter(loop._data_fetcher)
        for _ in range(count):
            next(loop._data_fetcher)
        loop._data_fetcher.fetched -= count  # Lightning has counted them already
        if not count:
            self._now = now
        _RestoreBeforeNext(loop._data_fetcher, now if count else capture())

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Module) -> None:
        now, self._now = self._now, None
        if _makes_iterator(trainer):
            if now is not None:
                restore(now)
            self._epoch = capture()

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Module, batch: Any, batch_idx: int) -> None:
        self._now = None
        progress: Any = trainer.fit_loop.epoch_progress
        if progress.current.started == progress.current.processed:
            # If the checkpoint is of an epoch's last batch, Lightning begins the next epoch without counting it.
            # After a second interruption the counters would not add up, and one epoch too many would be trained.
            progress.increment_ready()
            progress.increment_started()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step = capture()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Module) -> None:
        if self._step is not None and trainer.state.fn == TrainerFn.FITTING:
            restore(self._step)


class _RestoreBeforeNext:
    """Replace a fetcher's iterator until its next batch, and restore the random state just before that.

    Lightning may draw random numbers until then, for a validation that it skips.
    """

    def __init__(self, fetcher: Any, state: dict[str, Any]) -> None:
        self.fetcher, self.state, self.iterator = fetcher, state, fetcher.iterator
        fetcher.iterator = self

    def __next__(self) -> Any:
        self.fetcher.iterator = self.iterator
        restore(self.state)
        return next(self.iterator)


def _draws_by_itself(loader: Any) -> bool:
    """Return whether the order of batches, or what workers draw, follows from a generator other than torch's."""
    if hasattr(loader, "load_state_dict"):
        return False
    sampler = getattr(loader, "sampler", None)
    batched = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    drawing = [sampler, batched, *([loader] if getattr(loader, "num_workers", 0) else [])]
    return any(getattr(each, "generator", None) is not None for each in drawing)


def _makes_iterator(trainer: pl.Trainer) -> bool:
    """Return whether Lightning is to make the epoch's iterator after `on_train_epoch_start`, and has not done so."""
    loop = trainer.fit_loop
    return trainer.current_epoch > 0 and not loop.is_resuming and not loop.epoch_loop.restarting


def capture() -> dict[str, Any]:
    """Return the state of all random generators, as plain data and tensors."""
    numbers: Any
    kind, numbers, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(numbers.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore(state: dict[str, Any]) -> None:
    """Restore the state of all random generators from `capture`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, words, *rest = state["numpy"]
    numpy.random.set_state((kind, words.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
