"""Run `revlib train`, `eval` and `predict`, each from its composed configuration."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import RichProgressBar
from omegaconf import DictConfig, OmegaConf

from lightning_revlib.callbacks.memory import MemoryBreakdown
from lightning_revlib.callbacks.monitors import DriftMonitor
from lightning_revlib.nn import CoupledSequential
from lightning_revlib.nn.convert.swap import stacks
from lightning_revlib.recipes.commands.checkpoint import (
    SignCheckpoint,
    load_data,
    load_module,
    read,
    same_architecture,
    same_optimizer,
)
from lightning_revlib.recipes.commands.memory_report import activations
from lightning_revlib.recipes.commands.trainer import (
    MetricCheck,
    check_metric,
    interruptible,
    make_trainer,
    seed_all,
    threads,
)
from lightning_revlib.recipes.display.curves import draw_curves
from lightning_revlib.recipes.display.panel import show, show_training
from lightning_revlib.recipes.tasks.classifier import ImageClassifier

RESULTS = "results.json"  # the metrics of the best checkpoint, in the folder of the run; a sweep's table reads it


def train(cfg: DictConfig) -> float:
    """Fit, test the best checkpoint and print the panel; return that checkpoint's `optimized_metric`."""
    seed_all(cfg.seed)
    data: L.LightningDataModule = instantiate(cfg.data)
    module: L.LightningModule = instantiate(cfg.recipe, **getattr(data, "model_arguments", {}))
    overrides = [*HydraConfig.get().overrides.task] if HydraConfig.initialized() else []
    _keep_former(Path(cfg.paths.output_dir), cfg.ckpt_path)
    start = _first_step(cfg, module, overrides)
    trainer = make_trainer(cfg, [SignCheckpoint(overrides), MetricCheck(cfg.optimized_metric)])
    for logger in trainer.loggers:
        logger.log_hyperparams(_plain(cfg))

    with threads(cfg.threads), interruptible(trainer, cfg.ckpt_path):
        original = _test_original(cfg, module, data) if trainer.world_size == 1 else {}
        begin = time.perf_counter()
        trainer.fit(module, data, ckpt_path=cfg.ckpt_path, weights_only=True)
    seconds = time.perf_counter() - begin
    reversible = stacks(module)
    plans = {str(stack.plan).splitlines()[0] for stack in reversible.values() if stack.plan is not None}
    drift = _describe_drift(trainer, list(reversible.values()), trainer.global_step > start)

    kept: Any = trainer.checkpoint_callback  # a run that ends before its first validation has no best one
    best = getattr(kept, "best_model_path", "") or getattr(kept, "last_model_path", "") or None
    if isinstance(trainer.progress_bar_callback, RichProgressBar):
        trainer.progress_bar_callback.disable()
        trainer.progress_bar_callback.progress = None  # each further stop would leave an empty line
    options: Any = {"datamodule": data, "ckpt_path": best, "verbose": False, "weights_only": True}
    with interruptible(trainer, cfg.ckpt_path):
        metrics = {**trainer.validate(module, **options)[0], **trainer.test(module, **options)[0]}
    if trainer.is_global_zero:
        found, measured = None, None
        # One process of several cannot run a model whose parameters are sharded.
        if trainer.world_size == 1 and (reversible or any(isinstance(m, CoupledSequential) for m in module.modules())):
            inputs = _inputs(data, module)
            few = few_samples(inputs, module)
            measured = None if few is inputs else " x ".join(map(str, few.shape))
            found = activations(module.train(), few, ("plain", "reversible"))
        what = f"{_name(module)} on {_name(data)}"
        show_training(
            metrics,
            found,
            drift,
            seconds,
            cfg.paths.output_dir,
            best,
            run=[("run", what), ("overrides", " ".join(overrides) or "none")],
            plans=sorted(plans),
            measured=measured,
            original=original,
        )
        for callback in trainer.callbacks:
            if isinstance(callback, MemoryBreakdown) and callback.memory is not None:
                print(callback.memory)
        (Path(cfg.paths.output_dir) / RESULTS).write_text(json.dumps(metrics, indent=1))
        draw_curves(trainer.loggers)
    check_metric(cfg.optimized_metric, metrics)
    return float(metrics[cfg.optimized_metric])


def evaluate(cfg: DictConfig) -> None:
    """Test a checkpoint on the held-out data."""
    data, module, trainer = _restore(cfg)
    with interruptible(trainer):
        metrics = trainer.test(module, data, verbose=False)[0]
    show(
        "revlib eval",
        [
            ("run", f"{_name(module)} on {_name(data)}"),
            *((k, f"{v:.4f}") for k, v in metrics.items()),
            ("checkpoint", str(cfg.ckpt_path)),
        ],
    )


def predict(cfg: DictConfig) -> None:
    """Run a checkpoint on the held-out data, and show the predictions by the module's `present(batches, cfg)`."""
    data, module, trainer = _restore(cfg)
    _check_display(cfg, module)
    with interruptible(trainer):
        batches: Any = trainer.predict(module, data)
    present: Any = module.present
    run = ("run", f"{_name(module)} on {_name(data)}")
    show("revlib predict", [run, *present(batches, cfg), ("checkpoint", str(cfg.ckpt_path))])


def _test_original(cfg: DictConfig, module: L.LightningModule, data: L.LightningDataModule) -> Mapping[str, float]:
    """Return the test metrics of a pretrained model before it is swapped and trained; none of another module."""
    if not getattr(module, "is_pretrained", False):
        return {}
    silent = {"callbacks": [], "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return instantiate(cfg.trainer, strategy="auto", **silent).test(module, data, verbose=False)[0]


def _plain(cfg: DictConfig) -> Any:
    """Return the configuration as a dictionary, without keys that are not given because the recipe has its own."""
    given = [str(key) for key in cfg if not OmegaConf.is_missing(cfg, key)]
    return OmegaConf.to_container(OmegaConf.masked_copy(cfg, given), resolve=True)


def _keep_former(folder: Path, resumed: str | None) -> None:
    """Raise ValueError if the run would replace the checkpoints of another one."""
    former = sorted(folder.glob("checkpoints/*.ckpt"))
    if former and (resumed is None or folder.resolve() not in Path(resumed).resolve().parents):
        raise ValueError(
            f"{folder} has checkpoints of another run, which this one would replace; name another folder by"
            f" hydra.run.dir, of a sweep by hydra.sweep.dir, or go on with that run by ckpt_path={folder}"
        )


def _first_step(cfg: DictConfig, module: L.LightningModule, overrides: Sequence[str]) -> int:
    """Return the number of steps done before this run; ValueError for a checkpoint from which it cannot resume."""
    if cfg.ckpt_path is None:
        return 0
    checkpoint = read(cfg.ckpt_path)
    same_architecture(checkpoint, module, cfg.ckpt_path)
    same_optimizer(checkpoint, overrides, cfg.ckpt_path)
    return checkpoint["global_step"]


def _describe_drift(trainer: L.Trainer, reversible: list[Any], trained: bool) -> str:
    """Return the largest drift of the last step, or why there is none."""
    # A metric may be of a former step, before a memory budget stored all blocks.
    was_rebuilt = any(stack.drift is not None for stack in reversible)
    if was_rebuilt and (drift := trainer.callback_metrics.get("drift/worst")) is not None:
        return f"{float(drift):.1e}, relative"
    if not reversible:
        return "none: ordinary autograd rebuilds nothing"
    if not trained:
        return "not measured: no epoch was left to train"
    if not any(isinstance(callback, DriftMonitor) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return "not measured: no callbacks.drift"
    return "not measured: on_drift=ignore" if reversible[0].on_drift == "ignore" else "none: no block was rebuilt"


def _restore(cfg: DictConfig) -> tuple[L.LightningDataModule, L.LightningModule, L.Trainer]:
    """Return the data and module of a checkpoint, and a Trainer."""
    seed_all(cfg.seed)
    module, data = load_module(cfg), load_data(cfg)
    if others := getattr(data, "model_arguments", {}).keys() - module.hparams.keys():
        raise ValueError(
            f"data: {_name(data)} has {', '.join(sorted(others))}, and the checkpoint's {_name(module)} works on other"
            " data; leave data out, to take those of its training"
        )
    return data, module, make_trainer(cfg)


def _check_display(cfg: DictConfig, module: L.LightningModule) -> None:
    """Raise ValueError for a module that cannot show its predictions, and for a key with a value that it cannot have.

    A module of images has no use for a prompt.
    """
    if not hasattr(module, "present"):
        raise ValueError(
            f"{type(module).__name__} has no method `present(batches, cfg)`, which shows its predictions; define it"
        )
    for key in ("images", "count", "top_k"):
        value = cfg.get(key)
        if (value is not None or key != "top_k") and (type(value) is not int or value < 1):
            raise ValueError(f"{key}={value}: pass a whole number of 1 or more{', or null' * (key == 'top_k')}")
    if type(cfg.temperature) not in (int, float) or cfg.temperature < 0:
        raise ValueError(f"temperature={cfg.temperature}: pass a number of 0 or more; 0 takes the likeliest byte")
    if isinstance(module, ImageClassifier) and cfg.prompt is not None:
        raise ValueError(
            f"prompt={cfg.prompt}: {_name(module)} works on images; leave it out, or take the checkpoint of a language"
            " model, such as one of experiment=reformer_topics"
        )
    if cfg.prompt == "":
        raise ValueError("prompt='': pass one character or more, or leave it out for the beginning of held-out text")


def _name(part: object) -> str:
    """Return the name of a module's or data's class, as the panel shows it."""
    return type(part).__name__.removesuffix("Module")


def _inputs(data: L.LightningDataModule, module: L.LightningModule) -> Any:
    """Return a batch of the training data as the module gets it, without the labels."""
    batch = data.transfer_batch_to_device(next(iter(data.train_dataloader())), module.device, 0)
    inputs = data.on_after_batch_transfer(batch, 0)
    inputs = inputs[0] if isinstance(inputs, (list, tuple)) else inputs
    return inputs.to(module.dtype) if inputs.is_floating_point() else inputs


def few_samples(inputs: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """Return the batch on which activations are measured, or two samples of it if the batch takes long on a CPU.

    Sequences are cut to 4,096 tokens then.
    """
    numbers = inputs.is_floating_point()  # while each token becomes a vector of numbers
    if inputs.numel() <= (2**20 if numbers else 2**16) and sum(p.numel() for p in module.parameters()) <= 10**7:
        return inputs
    return inputs[:2] if numbers else inputs[:2, :4096]
