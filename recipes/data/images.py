"""What all image data share: parts that do not overlap, loaders, and augmentation on the device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_revlib.recipes.data.augment import crop, flip, jitter

Labelled: TypeAlias = tuple[Dataset[Any], Tensor]  # images with labels, and all the labels


class ImageData(L.LightningDataModule):
    """Base of the image data: `load` says what there is, this class divides it and serves batches.

    Images wait as bytes where they come so, and become numbers in [0, 1] on the device; there, too,
    they are augmented in training. The held-out part is seen by `test` and `predict` only.

    Args:
        batch_size: images a step.
        validation: so many images of the training part choose the checkpoint instead, all classes in
            proportion; where the data come with a part for it, that is taken.
        crop: shift training images by up to so many pixels in each direction.
        flip: exchange left and right in half of them.
        jitter: turn, stretch and shift them: the standard deviation of the entries of a random
            affine map, of which 1 is half an image.
        augment: a function of a batch of training images of your own, such as a module of kornia.
        mean, std: of each channel, for images in [0, 1]; they are subtracted and divided by.
        num_workers: processes that load; 0 is fastest where all images are in memory.
        split_seed: of the division into parts. Not the run's seed, so that what one run has held
            out, no other has trained on.

    Raises:
        ValueError: for data that are not there, saying where to get them, or not as they should be.
    """

    shape: tuple[int, int, int]
    classes: int
    parts: dict[str, Dataset[Any]]

    def __init__(
        self,
        batch_size: int = 64,
        *,
        validation: int = 0,
        crop: int = 0,
        flip: bool = False,
        jitter: float = 0.0,
        augment: Callable[[Tensor], Tensor] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        num_workers: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["augment"])  # the subclass's arguments, too
        self.augment = augment
        self.parts = {}
        for name, numbers in (("mean", mean), ("std", std)):
            self.hparams[name] = None if numbers is None else [*map(float, numbers)]  # plain, for the checkpoint
            if numbers is not None and len(numbers) not in (1, self.shape[0]):
                raise ValueError(f"{name}={list(numbers)}: give one number for each of {self.shape[0]} channels")

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What a network must know of its data."""
        return {"shape": self.shape, "classes": self.classes}

    @abstractmethod
    def load(self) -> dict[str, Labelled]:
        """The parts "train" and "test", and "val" if the data come with one."""

    def setup(self, stage: str | None = None) -> None:
        if self.parts:
            return
        parts = self.load()
        if "val" not in parts:
            images, labels = parts["train"]
            train, val = self.divide(labels, self.hparams["validation"], "validation")
            parts["train"], parts["val"] = (_take(images, labels, index) for index in (train, val))
        if len(parts["train"][1]) < self.hparams["batch_size"]:
            raise ValueError(
                f"batch_size={self.hparams['batch_size']}: {len(parts['train'][1])} images are there to train on"
            )
        self.parts = {name: images for name, (images, _) in parts.items()}

    def divide(self, labels: Tensor, size: int, name: str) -> list[Tensor]:
        """Indices of all labels but `size`, and of these, with all classes in the same proportion."""
        from sklearn.model_selection import train_test_split

        classes = len(labels.unique())
        if not classes <= size <= len(labels) - classes:
            raise ValueError(
                f"{name}={size}: of {len(labels)} images of {classes} classes, {classes} to {len(labels) - classes}"
                " can be put aside"
            )
        index = torch.arange(len(labels))
        return train_test_split(index, test_size=size, random_state=self.hparams["split_seed"], stratify=labels)

    def on_after_batch_transfer(self, batch: Sequence[Tensor], dataloader_idx: int) -> list[Tensor]:
        images, labels = batch
        if not images.is_floating_point():
            dtype = torch.get_default_dtype() if self.trainer is None else self.trainer.lightning_module.dtype
            images = images.to(dtype) / 255
        images = self.fit(images, training := self.trainer is not None and bool(self.trainer.training))
        if training:
            images = crop(images, self.hparams["crop"]) if self.hparams["crop"] else images
            images = flip(images) if self.hparams["flip"] else images
            images = jitter(images, self.hparams["jitter"]) if self.hparams["jitter"] else images
            images = images if self.augment is None else self.augment(images)
        for name, change in (("mean", torch.sub), ("std", torch.div)):
            if (numbers := self.hparams[name]) is not None:
                images = change(images, images.new_tensor(numbers)[:, None, None])
        return [images, labels]

    def fit(self, images: Tensor, training: bool) -> Tensor:
        """The images (B, C, H, W) in the size that the network takes; for data that load larger ones."""
        return images

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


def labelled(images: Tensor, labels: Tensor) -> Labelled:
    """Images (N, C, H, W) and labels (N,) in memory."""
    return TensorDataset(images, labels), labels


def _take(images: Dataset[Any], labels: Tensor, index: Tensor) -> Labelled:
    if isinstance(images, TensorDataset):
        return TensorDataset(*(tensor[index] for tensor in images.tensors)), labels[index]
    return Subset(images, index.tolist()), labels[index]
