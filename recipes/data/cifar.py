"""CIFAR-10 and CIFAR-100: from a folder in either of the forms they are published in, or by `datasets`."""

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
        root: a folder with the files of https://www.cs.toronto.edu/~kriz/cifar.html, unpacked, in the
            version for Python or the binary one, or with the folder that they unpack to. None: the
            data come from the Hugging Face hub, by the package `datasets`.

    Other arguments are `ImageData`'s; 5,000 of the training images choose the checkpoint.
    """

    shape, classes = (3, 32, 32), 10
    TRAIN, TEST = tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)  # .bin in the binary version
    FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
    HUB, LABEL, LABELS = "uoft-cs/cifar10", "label", 1  # the latter: bytes of labels before an image's in a binary file

    def __init__(
        self, root: str | None = None, batch_size: int = 64, *, validation: int = 5000, **options: Any
    ) -> None:
        super().__init__(batch_size, validation=validation, **options)

    def load(self) -> dict[str, Labelled]:
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
            " archive of https://www.cs.toronto.edu/~kriz/cifar.html there, or leave data.root out to have them from"
            " the hub"
        )

    def _python(self, file: Path) -> tuple[Tensor, Tensor]:
        with file.open("rb") as stream:
            try:
                batch = _Arrays(stream, encoding="bytes").load()
                images, labels = batch[b"data"], batch[b"fine_labels" if b"fine_labels" in batch else b"labels"]
                return torch.from_numpy(np.array(images, dtype=np.uint8)).view(-1, *self.shape), torch.tensor(labels)
            except (pickle.UnpicklingError, EOFError, KeyError, TypeError, RuntimeError) as error:
                raise ValueError(f"{file} is not a batch of CIFAR's version for Python: {error}") from error

    def _binary(self, file: Path) -> tuple[Tensor, Tensor]:
        content = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
        record = self.LABELS + 3 * 32 * 32
        if not len(content) or len(content) % record:
            raise ValueError(f"{file} has {len(content)} bytes, and CIFAR's binary version {record} for each image")
        rows = content.view(-1, record)
        return rows[:, self.LABELS :].reshape(-1, *self.shape), rows[:, self.LABELS - 1].long()  # the last is the class

    def _from_hub(self) -> dict[str, Labelled]:
        elsewhere = "or unpack https://www.cs.toronto.edu/~kriz/cifar.html and name the folder by data.root=..."
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise ValueError(
                f"{self.HUB} comes by the package datasets, which is not installed: pip install datasets, {elsewhere}"
            ) from error
        try:
            parts = load_dataset(self.HUB)
        except Exception as error:  # no network, no such cache: it raises what its many layers raise
            raise ValueError(
                f"{self.HUB} cannot be had ({type(error).__name__}: {error}); try again, {elsewhere}"
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
    """As `CIFAR10`, with 100 classes."""

    classes = 100
    TRAIN, TEST = ("train",), ("test",)
    FOLDERS = ("cifar-100-python", "cifar-100-binary")
    HUB, LABEL, LABELS = "uoft-cs/cifar100", "fine_label", 2


class _Arrays(pickle.Unpickler):
    """Reads plain data and arrays, and refuses whatever else a pickle may name: it could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        if module.replace("_core", "core") == "numpy.core.multiarray" and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _joined(parts: list[tuple[Tensor, Tensor]]) -> Labelled:
    images, labels = zip(*parts, strict=True)
    return labelled(torch.cat(images), torch.cat(labels))
