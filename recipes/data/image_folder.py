"""Images in a folder for each class, the usual form of ImageNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_revlib.recipes.data.augment import center_crop, resized_crop
from lightning_revlib.recipes.data.images import ImageData, Labelled

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}


class ImageFolder(ImageData):
    """Images of any size, in `root/train/<class>/` and `root/test/<class>/` or `root/val/<class>/`.

    >>> data = ImageFolder("imagenet", size=224, smallest=0.08, flip=True, batch_size=256, num_workers=8)

    Pillow decodes each image when it is needed, and resizes its middle to a square of `size` * 8 / 7 pixels. The
    device takes a random part of the square in training and its middle otherwise. With `train` and `val` only, as in
    ImageNet, `val` is held out, and `validation` images of `train` choose the checkpoint. With all three folders,
    `val` chooses it.

    Args:
        root: the folder.
        size: height and width in pixels.
        smallest: the least share of an image's area that a random part has; 1 always takes the middle.
        batch_size, **options: see `ImageData`.
    """

    def __init__(
        self, root: str, batch_size: int = 64, *, size: int = 224, smallest: float = 0.08, **options: Any
    ) -> None:
        self.shape, self.root = (3, size, size), Path(root)
        entries = [entry for entry in self._folder("train").iterdir() if entry.is_dir()]
        names = sorted(entry.name for entry in entries if entry.name[0] != ".")
        if len(names) < 2:
            raise ValueError(f"data.root={root}: train needs a folder for each class, and has {len(names)}")
        self.names, self.classes = names, len(names)
        super().__init__(batch_size, **options)

    def load(self) -> dict[str, Labelled]:
        """List the files of each part."""
        three = all((self.root / part).is_dir() for part in ("val", "test"))
        held_out = "test" if (self.root / "test").is_dir() else "val"
        folders = {"train": "train", "test": held_out} | ({"val": "val"} if three else {})
        parts: dict[str, Labelled] = {}
        for part, folder in folders.items():
            dataset = _Files(self._folder(folder), self.names, round(self.shape[1] * 8 / 7))
            labels = [label for _, label in dataset.files]
            if part == "train" and (empty := sorted({*range(self.classes)} - {*labels})):
                raise ValueError(f"{self._folder(folder)} has no images in {', '.join(self.names[i] for i in empty)}")
            parts[part] = dataset, torch.tensor(labels)
        return parts

    def fit(self, images: Tensor, training: bool) -> Tensor:
        """Return a random part of each square in training, and its middle otherwise."""
        size, smallest = self.shape[1], self.hparams["smallest"]
        return resized_crop(images, size, smallest) if training and smallest < 1 else center_crop(images, size)

    def _folder(self, part: str) -> Path:
        """Return a part's folder; ValueError if it does not exist."""
        if not (folder := self.root / part).is_dir():
            raise ValueError(
                f"data.root={self.root} has no folder {part}: put images in {self.root}/train/<class>/ and"
                f" {self.root}/val/<class>/, or name another folder by data.root=..."
            )
        return folder


class _Files(Dataset[Any]):
    """The images of a folder, each as a square of `side` pixels."""

    def __init__(self, folder: Path, names: list[str], side: int) -> None:
        self.side = side
        folders = {entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."}
        if others := folders - set(names):
            raise ValueError(f"{folder} has classes that train has not: {', '.join(sorted(others))}; move them away")
        self.files = [
            (file, label)
            for label, name in enumerate(names)
            for file in sorted((folder / name).glob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise ValueError(
                f"{folder} has no images in {', '.join(names[:3])}, ...; suffixes are {' '.join(sorted(SUFFIXES))}"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image, ImageOps, UnidentifiedImageError

        file, label = self.files[index]
        try:
            with Image.open(file) as image:
                square = ImageOps.fit(image.convert("RGB"), (self.side, self.side), Image.Resampling.BILINEAR)
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{file} cannot be read as an image: {error}") from error
        return torch.from_numpy(np.array(square)).permute(2, 0, 1), label
