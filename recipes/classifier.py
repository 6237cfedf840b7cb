"""What all image classifiers share in training: loss, accuracy, optimizer and schedule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

OptimizerFactory: TypeAlias = Callable[[Any], torch.optim.Optimizer]
SchedulerFactory: TypeAlias = Callable[..., torch.optim.lr_scheduler.LRScheduler]


class ImageClassifier(L.LightningModule):
    """Trains a network from images (B, C, H, W) to logits (B, classes) by cross-entropy.

    >>> ImageClassifier(net, classes=10, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))

    Logs `train/loss`, `train/acc`, `val/loss`, `val/acc`, `test/loss` and `test/acc`.

    Args:
        net: the network.
        classes: how many.
        optimizer: called with the parameters; default SGD, lr 0.01, momentum 0.9.
        scheduler: called with the optimizer; default none. One that takes `total_steps`, such as
            OneCycleLR, is given them and steps with each batch, any other with each epoch.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        classes: int,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self._optimizer, self._scheduler = optimizer, scheduler
        accuracy = MetricCollection({"acc": MulticlassAccuracy(classes, average="micro")})
        # "train" itself is a method of every module, and no name for a child
        self.accuracy = nn.ModuleDict({f"{stage}_": accuracy.clone(f"{stage}/") for stage in ("train", "val", "test")})

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._step(batch, "val")

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._step(batch, "test")

    def configure_optimizers(self) -> Any:
        make = self._optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9))
        optimizer = make(self.parameters())
        if self._scheduler is None:
            return optimizer
        if "total_steps" in inspect.signature(self._scheduler).parameters:
            scheduler = self._scheduler(optimizer, total_steps=int(self.trainer.estimated_stepping_batches))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        return {"optimizer": optimizer, "lr_scheduler": self._scheduler(optimizer)}

    def on_train_start(self) -> None:
        steps = int(self.trainer.estimated_stepping_batches)
        for config in self.trainer.lr_scheduler_configs:  # as restored from a checkpoint, if there is one
            if (planned := getattr(config.scheduler, "total_steps", steps)) < steps:
                raise ValueError(
                    f"the checkpoint's learning rate was planned for {planned} steps, and this run has {steps}: a cycle"
                    " cannot be prolonged; keep max_epochs, or train afresh"
                )

    def _step(self, batch: Sequence[Tensor], stage: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        metrics = cast(MetricCollection, self.accuracy[f"{stage}_"])
        metrics.update(logits, labels)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=stage == "val", batch_size=len(labels))
        return loss
