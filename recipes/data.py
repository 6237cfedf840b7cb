"""The data of the recipes. Each module states, as `model_arguments`, what a network must know of it."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Digits(L.LightningDataModule):
    """1,797 handwritten digits, 8 x 8 pixels in [0, 1], 10 classes; bundled with scikit-learn.

    >>> data = Digits(batch_size=64)
    >>> data.setup("fit")
    >>> images, labels = next(iter(data.train_dataloader()))    # (64, 1, 8, 8), (64,)

    1,293 images train, 144 choose the checkpoint, and 360 are held out: they are seen by `test` and
    `predict` only. All classes are in each part in the same proportion.

    Args:
        batch_size: images a step.
        jitter: how far training images are turned, stretched and shifted: the standard deviation of
            the entries of a random affine map, of which 1 is half an image. 0.1 shifts by 0.4 pixels.
        num_workers: processes that load; 0 is fastest, as all images are in memory.
        split_seed: of the division into parts. Not the run's seed, so that what one run has held
            out, no other has trained on.
    """

    SHAPE, CLASSES, HELD_OUT, VALIDATION = (1, 8, 8), 10, 360, 144

    def __init__(self, batch_size: int = 64, jitter: float = 0.1, num_workers: int = 0, split_seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.parts: dict[str, TensorDataset] = {}

    @property
    def model_arguments(self) -> dict[str, Any]:
        return {"shape": self.SHAPE, "classes": self.CLASSES}

    def setup(self, stage: str | None = None) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        labels = torch.from_numpy(digits.target).long()

        def divide(index: Tensor, size: int) -> list[Tensor]:
            return train_test_split(
                index, test_size=size, random_state=self.hparams["split_seed"], stratify=labels[index]
            )

        rest, test = divide(torch.arange(len(labels)), self.HELD_OUT)
        train, val = divide(rest, self.VALIDATION)
        self.parts = {
            k: TensorDataset(images[i], labels[i]) for k, i in {"train": train, "val": val, "test": test}.items()
        }

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        images, labels = batch
        if self.trainer is not None and self.trainer.training and self.hparams["jitter"]:
            images = jitter(images, self.hparams["jitter"])
        return [images, labels]

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", shuffle=True, drop_last=True)  # a small last batch would upset BatchNorm

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def _loader(self, part: str, **options: Any) -> DataLoader[Any]:
        size, workers = self.hparams["batch_size"], self.hparams["num_workers"]
        return DataLoader(
            self.parts[part], batch_size=size, num_workers=workers, persistent_workers=workers > 0, **options
        )


def jitter(images: Tensor, amount: float) -> Tensor:
    """Each of the images (B, C, H, W) under an affine map of its own, near the identity."""
    maps = (torch.eye(2, 3) + amount * torch.randn(len(images), 2, 3)).to(images)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
