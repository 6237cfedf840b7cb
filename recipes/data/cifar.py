"""CIFAR-10 and CIFAR-100, from a folder in either of their published formats, or by the package `datasets`."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_revlib.recipes.data.images import ImageData, Labelled, labelled


class CIFAR10(ImageData):
    """50,000 colour images of 32 x 32 pixels, 10 classes, and 10,000 held out.

    Args:
        root: a folder with the unpacked files of https://www.cs.toronto.edu/~kriz/cifar.html, in the version for Python
            or the binary one, or with the folder that they unpack to. None: the data come from the Hugging Face hub, by
            the package `datasets`.
        batch_size, validation, **options: see `ImageData`; 5,000 of the training images choose the checkpoint.
    """

    shape, classes = (3, 32, 32), 10
    TRAIN, TEST = tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)  # .bin in the binary version
    FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
    HUB, LABEL = "uoft-cs/cifar10", "label"
    LABELS = 1  # number of bytes of labels before each image in a binary file

    def __init__(
        self, root: str | None = None, batch_size: int = 64, *, validation: int = 5000, **options: Any
    ) -> None:
        super().__init__(batch_size, validation=validation, **options)

    def load(self) -> dict[str, Labelled]:
        """Read the parts from the folder, or from the hub."""
        root = self.hparams["root"]
        if root is None:
            return self._from_hub()
        names = {"train": self.TRAIN, "test": self.TEST}
        for folder in (Path(root), *(Path(root) / name for name in self.FOLDERS)):
            for suffix, read in (("", self._python), (".bin", self._binary)):
                if all((folder / (name + suffix)).exists() for name in (*self.TRAIN, *self.TEST)):
                    return {part: _joined([read(folder / (n + suffix)) for n in names[part]]) for part in names}
        raise ValueError(
            f"data.root={root} has not all of {', '.join((*self.TRAIN, *self.TEST))}, nor the same as .bin: unpack an"
            " archive of https://www.cs.toronto.edu/~kriz/cifar.html there, or leave data.root out to load them from"
            " the hub"
        )

    def _python(self, file: Path) -> tuple[Tensor, Tensor]:
        """Read images and labels from a file of the version for Python."""
        with file.open("rb") as stream:
            try:
                batch = _ArrayUnpickler(stream, encoding="bytes").load()
                images, labels = batch[b"data"], batch[b"fine_labels" if b"fine_labels" in batch else b"labels"]
                return torch.from_numpy(np.array(images, dtype=np.uint8)).view(-1, *self.shape), torch.tensor(labels)
            except (pickle.UnpicklingError, EOFError, KeyError, TypeError, RuntimeError) as error:
                raise ValueError(f"{file} is not a batch of CIFAR's version for Python: {error}") from error

    def _binary(self, file: Path) -> tuple[Tensor, Tensor]:
        """Read images and labels from a file of the binary version."""
        content = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
        record = self.LABELS + 3 * 32 * 32
        if not len(content) or len(content) % record:
            raise ValueError(f"{file} has {len(content)} bytes, and CIFAR's binary version {record} for each image")
        rows = content.view(-1, record)
        return rows[:, self.LABELS :].reshape(-1, *self.shape), rows[:, self.LABELS - 1].long()  # last: the class

    def _from_hub(self) -> dict[str, Labelled]:
        """Read the parts by the package `datasets`."""
        elsewhere = "or unpack https://www.cs.toronto.edu/~kriz/cifar.html and name the folder by data.root=..."
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                f"{self.HUB} comes by the package datasets, which is not installed: pip install datasets, {elsewhere}"
            ) from error
        try:
            parts = load_dataset(self.HUB)
        except Exception as error:  # without network or cache, each of its layers has errors of its own
            raise ValueError(
                f"{self.HUB} cannot be loaded ({type(error).__name__}: {error}); try again, {elsewhere}"
            ) from error
        return {
            part: labelled(
                torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in parts[part]["img"]])
                .permute(0, 3, 1, 2)
                .contiguous(),
                torch.tensor(parts[part][self.LABEL]),
            )
            for part in ("train", "test")
        }


class CIFAR100(CIFAR10):
    """50,000 colour images of 32 x 32 pixels, 100 classes, and 10,000 held out; arguments as for `CIFAR10`."""

    classes = 100
    TRAIN, TEST = ("train",), ("test",)
    FOLDERS = ("cifar-100-python", "cifar-100-binary")
    HUB, LABEL, LABELS = "uoft-cs/cifar100", "fine_label", 2


class _ArrayUnpickler(pickle.Unpickler):
    """Read plain data and arrays, and refuse all other names in a pickle, since they could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.replace("_core", "core") == "numpy.core.multiarray" and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _joined(parts: list[tuple[Tensor, Tensor]]) -> Labelled:
    """Join the images and labels of several files."""
    images, labels = zip(*parts, strict=True)
    return labelled(torch.cat(images), torch.cat(labels))
