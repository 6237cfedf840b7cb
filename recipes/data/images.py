"""Base of the image data: parts that do not overlap, loaders, and augmentation on the device."""

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
    """Base of the image data: a subclass loads the parts, this class divides them and makes batches.

    Images of bytes stay bytes in memory, and become numbers in [0, 1] on the device, where training images are
    augmented. Only `test` and `predict` see the held-out part.

    Args:
        batch_size: number of images in a batch.
        validation: number of training images that choose the checkpoint instead, with all classes in proportion; not
            used if the data have a part "val".
        crop: largest shift of training images in each direction, in pixels.
        flip: exchange left and right in half of the training images.
        jitter: standard deviation of the entries of a random affine map of training images, in units of half an image.
        augment: a function of your own from a batch of training images to another, such as a module of kornia.
        mean, std: of each channel, for images in [0, 1]; the mean is subtracted, then the result is divided by std.
        num_workers: number of processes that load; 0 is fastest if all images are in memory.
        split_seed: of the division into parts. It is not the run's seed, so that no run trains on images that another
            run has held out.

    Raises:
        ValueError: for data that do not exist, with the place to get them, or that have another format.
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
        self.save_hyperparameters(ignore=["augment"])  # and the subclass's arguments
        self.augment = augment
        self.parts = {}
        for name, numbers in (("mean", mean), ("std", std)):
            self.hparams[name] = None if numbers is None else [*map(float, numbers)]  # plain Python, for the checkpoint
            if numbers is not None and len(numbers) not in (1, self.shape[0]):
                raise ValueError(f"{name}={list(numbers)}: give one number for each of {self.shape[0]} channels")
        if isinstance(jitter, str) or jitter < 0:
            raise ValueError(f"jitter={jitter!r}: pass a number of 0 or more")

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments of a network that depend on the data."""
        return {"shape": self.shape, "classes": self.classes}

    @abstractmethod
    def load(self) -> dict[str, Labelled]:
        """Return the parts "train" and "test", and "val" if the data have one."""

    def setup(self, stage: str | None = None) -> None:
        """Load the parts and put images for validation aside, once."""
        if self.parts:
            return
        parts = self.load()
        if "val" not in parts:
            images, labels = parts["train"]
            train, val = self.divide(labels, self.hparams["validation"], "validation")
            parts["train"], parts["val"] = (_take(images, labels, index) for index in (train, val))
        if len(parts["train"][1]) < self.hparams["batch_size"]:
            raise ValueError(
                f"batch_size={self.hparams['batch_size']}: {len(parts['train'][1])} images are too few to train on"
            )
        self.parts = {name: images for name, (images, _) in parts.items()}

    def divide(self, labels: Tensor, size: int, name: str) -> list[Tensor]:
        """Return the indices of all labels but `size`, and of these `size`, with classes in proportion in both."""
        from sklearn.model_selection import train_test_split

        classes = len(labels.unique())
        if not classes <= size <= len(labels) - classes:
            raise ValueError(
                f"{name}={size}: of {len(labels)} images of {classes} classes, {classes} to {len(labels) - classes}"
                " can be put aside"
            )
        index = torch.arange(len(labels))
        return train_test_split(index, test_size=size, random_state=self.hparams["split_seed"], stratify=labels)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        dtype = torch.get_default_dtype() if self.trainer is None else self.trainer.lightning_module.dtype
        if isinstance(batch, Tensor):  # a module's example_input_array, for Lightning's summary or a logger's graph
            return batch.to(dtype)
        images, labels = batch
        if not images.is_floating_point():
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
        """Return the images (B, C, H, W) in the network's size; for data that load larger images."""
        return images

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", shuffle=True, drop_last=True)  # BatchNorm needs more than a few images

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
    """Return images (N, C, H, W) and labels (N,) in memory as a part."""
    return TensorDataset(images, labels), labels


def _take(images: Dataset[Any], labels: Tensor, index: Tensor) -> Labelled:
    """Return the images and labels at an index."""
    if isinstance(images, TensorDataset):
        return TensorDataset(*(tensor[index] for tensor in images.tensors)), labels[index]
    return Subset(images, index.tolist()), labels[index]
