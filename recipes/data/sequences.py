"""Sequences that are no text: made up to test attention, and images byte by byte."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_revlib.recipes.data.text import SequenceData


class Words(Dataset[list[Tensor]]):
    """0 w 0 w, w a word of random symbols; with a seed, always the same words.

    Without, a number drawn anew is the seed: processes that draw the same one still get different words, as the sampler
    gives them different indices.
    """

    def __init__(self, count: int, length: int, vocab: int, seed: int | None = None) -> None:
        self.count, self.length, self.vocab, self.seed = count, length, vocab, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> list[Tensor]:
        if index >= self.count:  # what ends a loop over it
            raise IndexError(index)
        base = int(torch.randint(2**31, ())) if self.seed is None else self.seed * 10**8
        generator = torch.Generator().manual_seed(base + index)  # which uses 32 bits
        word = torch.randint(1, self.vocab, (self.length // 2,), generator=generator)
        word[0] = 0
        half = torch.full_like(word, -100)
        return [torch.cat((word, word)), torch.cat((half, word))]


class Duplication(SequenceData):
    """The Reformer's test of whether attention finds what is far away: 0 w 0 w, of which the second half counts.

    >>> data = Duplication(length=256)
    >>> data.setup()
    >>> tokens, targets = next(iter(data.train_dataloader()))    # targets are -100 in the first half

    Args:
        length: of 0 w 0 w; the paper's is 1,024.
        vocab: symbols, of which words have all but 0; the paper's are 1 to 127.
        epoch: steps that make an epoch; words are never the same again.
        batch_size: words a step.
        held_out: words of validation and of test.
    """

    def __init__(
        self,
        length: int = 1024,
        vocab: int = 128,
        epoch: int = 100,
        batch_size: int = 16,
        held_out: int = 64,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if length < 4 or length % 2 or vocab < 2:
            raise ValueError(f"length={length}, vocab={vocab}: pass an even length of 4 or more, and 2 symbols or more")
        self.vocab = vocab

    def setup(self, stage: str | None = None) -> None:
        sizes = {"train": self.hparams["epoch"] * self.hparams["batch_size"]}
        sizes |= dict.fromkeys(("val", "test"), self.hparams["held_out"])
        seeds = {"train": None, "val": 1, "test": 2}
        self.parts = {
            part: Words(size, self.hparams["length"], self.hparams["vocab"], seeds[part])
            for part, size in sizes.items()
        }


class Images(Dataset[list[Tensor]]):
    """Images as rows of bytes, out of arrays mapped into memory."""

    def __init__(self, arrays: list[Any]) -> None:
        self.arrays = arrays
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> list[Tensor]:
        which = int(np.searchsorted(self.ends, index, side="right"))
        image = self.arrays[which][index - (self.ends[which - 1] if which else 0)]
        return [torch.from_numpy(image.reshape(-1).astype(np.int64))]


class ImageNet64(SequenceData):
    """Images of 64 x 64 pixels, each a sequence of 12,288 bytes: pixel by pixel, red, green and blue.

    >>> ImageNet64("data/imagenet64", batch_size=1)

    Args:
        folder: has train*.npy and val*.npy, arrays of uint8, (images, 64, 64, 3).
        size: the images' height and width.

    Raises:
        ValueError: if files are missing or have another shape.
    """

    def __init__(self, folder: str, size: int = 64, batch_size: int = 1, num_workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    @property
    def model_arguments(self) -> dict[str, Any]:
        return {"vocab": self.vocab, "length": self.hparams["size"] ** 2 * 3}

    def setup(self, stage: str | None = None) -> None:
        folder, size = Path(self.hparams["folder"]).expanduser(), self.hparams["size"]
        for part in ("train", "val"):
            arrays = [np.load(file, mmap_mode="r") for file in sorted(folder.glob(f"{part}*.npy"))]
            if not arrays:
                raise ValueError(
                    f"data.folder={folder} has no {part}*.npy, arrays of uint8 (images, {size}, {size}, 3). Of the .npz"
                    " files of downsampled ImageNet, https://image-net.org/download-images, they are made by"
                    " np.save(name, np.load(file)['data'].reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1))"
                )
            for array in arrays:
                if array.dtype != np.uint8 or math.prod(array.shape[1:]) != size**2 * 3:
                    raise ValueError(
                        f"data.folder={folder}: {part} has {array.dtype} of shape {list(array.shape)}, and is to have"
                        f" uint8 of shape [images, {size}, {size}, 3]"
                    )
            self.parts[part] = Images(arrays)
        self.parts["test"] = self.parts["val"]  # the published figures are of the validation images
