"""Image classifiers: loss, accuracy and the display of predictions."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_revlib.recipes.display.panel import Row
from lightning_revlib.recipes.display.picture import draw, to_unit
from lightning_revlib.recipes.tasks.base import OptimizerFactory, RecipeModule, SchedulerFactory


class ImageClassifier(RecipeModule):
    """Train a network from images (B, C, H, W) to logits (B, classes) by cross-entropy.

    >>> ImageClassifier(net, classes=10, optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))

    Logs `train/loss`, `train/acc`, `val/loss`, `val/acc`, `test/loss` and `test/acc`.

    Args:
        net: the network.
        classes: number of classes.
        shape: the images' channels, height and width, of which `revlib report` makes a batch.
        optimizer, scheduler: see `RecipeModule`.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        classes: int,
        shape: Sequence[int] | None = None,
        optimizer: OptimizerFactory | None = None,
        scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.net = net
        self.example_input_array = None if shape is None else torch.zeros(1, *shape)
        accuracy = MetricCollection({"acc": MulticlassAccuracy(classes, average="micro")})
        # the underscore is needed since "train" is a method of each module
        self.accuracy = nn.ModuleDict({f"{stage}_": accuracy.clone(f"{stage}/") for stage in ("train", "val", "test")})

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._step(batch, "val")

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self._step(batch, "test")

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return the class of each image and its probability; the first batch has the images as well."""
        probability, predicted = self(batch[0]).softmax(1).max(1)
        first = {} if batch_idx else {"images": batch[0].cpu()}
        return {"label": batch[1], "predicted": predicted, "probability": probability, **first}

    def present(self, batches: list[dict[str, Tensor]], cfg: Any) -> list[Row]:
        """Write the table and the picture of `revlib predict`, and return the rows to print."""
        label, predicted, probability = (
            torch.cat([b[k] for b in batches]).tolist() for k in ("label", "predicted", "probability")
        )
        table = Path(cfg.paths.output_dir) / "predictions.csv"
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image", "label", "predicted", "probability"])
            writer.writerows(zip(range(len(label)), label, predicted, probability, strict=True))
        images = to_unit(batches[0]["images"][: cfg.images].float())
        path = draw(
            cfg.picture,
            images,
            predicted,
            label,
            heading="class predicted (its probability), true class",
            notes=[f"({q:.0%})" for q in probability],
        )
        right = sum(p == y for p, y in zip(predicted, label, strict=True))
        return [
            ("right", f"{right} of {len(label)}, {right / len(label):.2%}"),
            ("classes", os.path.relpath(table)),
            ("picture", os.path.relpath(path)),
        ]

    def _step(self, batch: Sequence[Tensor], stage: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        metrics = cast(MetricCollection, self.accuracy[f"{stage}_"])
        metrics.update(logits, labels)
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)
        self.log_dict(metrics, on_step=False, on_epoch=True, prog_bar=stage == "val", batch_size=len(labels))
        return loss


def check_images(net: Mapping[str, Any]) -> None:
    """Raise ValueError if a network's arguments are those of sequences of tokens."""
    if tokens := sorted({"vocab", "length"} & set(net)):
        raise ValueError(
            f"{', '.join(tokens)}: the data are sequences of tokens, and this network works on images; take"
            " recipe=reformer, or data of images, such as data=digits"
        )


def blocks_in_stages(depth: int | Sequence[int], stages: int) -> list[int]:
    """Return the number of blocks in each stage, from a list or one number for all; ValueError for other depths."""
    blocks = list(depth) if isinstance(depth, Sequence) and not isinstance(depth, str) else [depth] * stages
    if any(not isinstance(count, int) or count < 1 for count in blocks):
        raise ValueError(
            f"depth={depth!r}: each stage needs a block or more; pass their number, an int or a list of ints"
        )
    return blocks


def image_dim(split_dim: int) -> int:
    """Return the dimension 1, 2 or 3 along which streams divide an image batch; ValueError for other dimensions."""
    if split_dim in (1, 2, 3, -1, -2, -3):
        return split_dim % 4
    why = "the streams would be different images, each of which changes how the others are classified"
    raise ValueError(
        f"split_dim={split_dim}: {why if split_dim in (0, -4) else 'an image batch has the dimensions 0 to 3'};"
        " take 1 (channels), 2 (height) or 3 (width)"
    )
