"""What the commands of `revlib` do, each from its composed configuration: train, evaluate, predict, report."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback, RichProgressBar
from omegaconf import DictConfig, OmegaConf

from lightning_revlib.nn.convert.swap import find, stacks
from lightning_revlib.recipes.commands.checkpoint import SignCheckpoint, load_data, load_module, read, same_architecture
from lightning_revlib.recipes.commands.memory_report import activations
from lightning_revlib.recipes.commands.memory_report import report_memory as report_memory
from lightning_revlib.recipes.display.curves import draw_curves
from lightning_revlib.recipes.display.panel import show, show_training


def train(cfg: DictConfig) -> float:
    """Fit, test the best checkpoint, print the panel; returns that checkpoint's `optimized_metric`."""
    _seed(cfg.seed)
    data: L.LightningDataModule = instantiate(cfg.data)
    module: L.LightningModule = instantiate(cfg.recipe, **getattr(data, "model_arguments", {}))
    if cfg.ckpt_path is not None:
        same_architecture(read(cfg.ckpt_path), module, cfg.ckpt_path)
    trainer = make_trainer(cfg, [SignCheckpoint()])
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]

    start = time.perf_counter()
    with _threads(cfg.threads):
        trainer.fit(module, data, ckpt_path=cfg.ckpt_path, weights_only=True)
    seconds = time.perf_counter() - start
    plans = {str(plan).splitlines()[0] for s in stacks(module).values() if (plan := getattr(s, "plan", None))}
    drift = trainer.callback_metrics.get("drift/worst")

    best = getattr(trainer.checkpoint_callback, "best_model_path", "") or None
    if isinstance(trainer.progress_bar_callback, RichProgressBar):
        trainer.progress_bar_callback.disable()
        trainer.progress_bar_callback.progress = None  # else it is stopped again, and leaves an empty line each time
    options: Any = {"datamodule": data, "ckpt_path": best, "verbose": False, "weights_only": True}
    metrics = {**trainer.validate(module, **options)[0], **trainer.test(module, **options)[0]}
    if trainer.is_global_zero:
        folder, reversible = cfg.paths.output_dir, bool(stacks(module))
        found, measured = None, None
        if trainer.world_size == 1 and find(module):  # one process of several cannot run a model that is shared out
            inputs = _inputs(data, module)
            few = few_samples(inputs, module)
            measured = None if few is inputs else " x ".join(map(str, few.shape))
            found = activations(module.train(), few, ("plain", "reversible"))
        details = {"reversible": reversible, "plans": sorted(plans), "measured": measured}
        show_training(metrics, found, drift, seconds, folder, best, **details)
        draw_curves(trainer.loggers)
    if cfg.optimized_metric not in metrics:
        raise ValueError(f"optimized_metric={cfg.optimized_metric} is none of {', '.join(sorted(metrics))}")
    return float(metrics[cfg.optimized_metric])


def evaluate(cfg: DictConfig) -> None:
    """Test a checkpoint on the held-out data."""
    data, module, trainer = _restore(cfg)
    metrics = trainer.test(module, data, verbose=False)[0]
    show("revlib eval", [*((k, f"{v:.4f}") for k, v in metrics.items()), ("checkpoint", str(cfg.ckpt_path))])


def predict(cfg: DictConfig) -> None:
    """Run a checkpoint on the held-out data, and let its module present what comes out: `present(batches, cfg)`."""
    data, module, trainer = _restore(cfg)
    batches: Any = trainer.predict(module, data)
    present: Any = getattr(module, "present", None)
    if present is None:
        raise ValueError(
            f"{type(module).__name__} does not say how its predictions are shown; give it a method `present`"
        )
    show("revlib predict", [*present(batches, cfg), ("checkpoint", str(cfg.ckpt_path))])


def make_trainer(cfg: DictConfig, callbacks: list[Callback] | None = None) -> L.Trainer:
    """The Trainer of a configuration, with its callbacks and loggers."""
    _quiet()
    Path(cfg.paths.output_dir).mkdir(parents=True, exist_ok=True)
    watching = [instantiate(one) for one in (cfg.get("callbacks") or {}).values()] + (callbacks or [])
    loggers = [instantiate(one) for one in (cfg.get("logger") or {}).values()]
    for key in ("max_epochs", "max_steps"):
        if isinstance(value := cfg.trainer.get(key), str):
            raise ValueError(f"trainer.{key}={value}: pass a whole number, such as trainer.{key}=30")
    return instantiate(cfg.trainer, callbacks=watching, logger=loggers)


def _restore(cfg: DictConfig) -> tuple[L.LightningDataModule, L.LightningModule, L.Trainer]:
    _seed(cfg.seed)
    module = load_module(cfg)
    return load_data(cfg), module, make_trainer(cfg)


def _inputs(data: L.LightningDataModule, module: L.LightningModule) -> Any:
    """A batch of the training data as the module gets it, without the labels."""
    batch = data.transfer_batch_to_device(next(iter(data.train_dataloader())), module.device, 0)
    inputs = data.on_after_batch_transfer(batch, 0)
    inputs = inputs[0] if isinstance(inputs, (list, tuple)) else inputs
    return inputs.to(module.dtype) if inputs.is_floating_point() else inputs


def few_samples(inputs: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """What activations are measured on at the end: the batch, or two samples if it would keep the CPU for long.

    Of a long sequence of tokens it is the first 4,096.
    """
    numbers = inputs.is_floating_point()  # each token becomes a vector of them
    if inputs.numel() <= (2**20 if numbers else 2**16) and sum(p.numel() for p in module.parameters()) <= 10**7:
        return inputs
    return inputs[:2] if numbers else inputs[:2, :4096]


def _seed(seed: object) -> None:
    if not isinstance(seed, int):
        raise ValueError(f"seed={seed}: pass a whole number, such as seed=0")
    L.seed_everything(seed, workers=True, verbose=False)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is not None and (not isinstance(count, int) or count < 1):
        raise ValueError(f"threads={count}: pass a whole number of 1 or more, or null")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _quiet() -> None:
    """Leave out what Lightning tells everybody: devices found, and advice for data that do not lie in memory."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*The number of training batches.*",
        ".*LeafSpec.*",
        ".*dirpath has changed.*",
    ):
        warnings.filterwarnings("ignore", message)
