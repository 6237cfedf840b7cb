"""The Trainer of a command, and what is set around it: seed, threads, Ctrl-C and messages."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig


def make_trainer(cfg: DictConfig, callbacks: list[Callback] | None = None) -> L.Trainer:
    """Build the Trainer of a configuration, with its callbacks and loggers."""
    _quiet()
    Path(cfg.paths.output_dir).mkdir(parents=True, exist_ok=True)
    callbacks, loggers = _parts(cfg, "callbacks") + (callbacks or []), _parts(cfg, "logger")
    numbers = {}
    for key in ("max_epochs", "max_steps"):
        if (value := cfg.trainer.get(key)) is None:
            continue
        if type(value) not in (int, float) or not float(value).is_integer():
            raise ValueError(f"trainer.{key}={value}: pass a whole number, such as trainer.{key}=30")
        numbers[key] = int(value)  # of 1e3, say
    for key in ("max_steps", *[f"limit_{part}_batches" for part in ("train", "val", "test", "predict")]):
        if cfg.trainer.get(key) == 0:
            raise ValueError(f"trainer.{key}=0: pass 1 or more, or leave it out")
    return instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, **numbers)


def _parts(cfg: DictConfig, group: str) -> list[Any]:
    """Return the objects of a group, without those that are null."""
    nodes = {name: node for name, node in (cfg.get(group) or {}).items() if node is not None}
    for name, node in nodes.items():
        if not isinstance(node, DictConfig):
            raise ValueError(f"{group}.{name}={node}: to leave it out write {group}.{name}=null")
    return [instantiate(node) for node in nodes.values()]


@contextmanager
def interruptible(trainer: L.Trainer, resumed: str | None = None) -> Iterator[None]:
    """Raise KeyboardInterrupt for the SystemExit with which Lightning answers Ctrl-C.

    Its argument is the checkpoint from which the run can resume: the last one, or the one that it `resumed` from.
    """
    try:
        yield
    except SystemExit as end:
        if not isinstance(end.__context__, KeyboardInterrupt):
            raise
        raise KeyboardInterrupt(getattr(trainer.checkpoint_callback, "last_model_path", "") or resumed) from None


class MetricCheck(Callback):
    """Raise ValueError in the first validation, not after training, if it does not log a metric."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look for the metric. Those of the test are not known yet."""
        if not str(self.name).startswith("test/"):
            check_metric(self.name, trainer.callback_metrics)


def check_metric(name: str, metrics: Mapping[str, Any]) -> None:
    if name not in metrics:
        raise ValueError(f"optimized_metric={name} is none of {', '.join(sorted(metrics))}")


def seed_all(seed: object) -> None:
    """Seed all generators; ValueError for a seed that is not a whole number."""
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: pass a whole number from 0 to 4294967295, such as seed=0")
    L.seed_everything(seed, workers=True, verbose=False)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Set the number of CPU threads inside the context; None keeps it."""
    if count is not None and (type(count) is not int or count < 1):
        raise ValueError(f"threads={count}: pass a whole number of 1 or more, or null")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quiet() -> None:
    """Silence Lightning's list of devices, and its advice for data that do not lie in memory."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*The number of training batches.*",
        ".*LeafSpec.*",
        ".*dirpath has changed.*",
    ):
        warnings.filterwarnings("ignore", message)
