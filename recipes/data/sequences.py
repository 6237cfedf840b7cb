"""Sequences other than text: a synthetic task for attention, and images byte by byte."""

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
    """0 w 0 w, where w is a word of random symbols; a seed gives the same words in each epoch.

    Without a seed, each word draws one. Processes that draw the same seed still get different words, since their
    samplers give them different indices.
    """

    def __init__(self, count: int, length: int, vocab: int, seed: int | None = None) -> None:
        self.count, self.length, self.vocab, self.seed = count, length, vocab, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> list[Tensor]:
        if index >= self.count:  # ends a loop over the dataset
            raise IndexError(index)
        base = int(torch.randint(2**31, ())) if self.seed is None else self.seed * 10**8
        generator = torch.Generator().manual_seed(base + index)  # which uses 32 bits of the seed
        word = torch.randint(1, self.vocab, (self.length // 2,), generator=generator)
        word[0] = 0
        half = torch.full_like(word, -100)
        return [torch.cat((word, word)), torch.cat((half, word))]


class Duplication(SequenceData):
    """The Reformer's test of attention over a distance: 0 w 0 w, of which the second half counts.

    >>> data = Duplication(length=256)
    >>> data.setup()
    >>> tokens, targets = next(iter(data.train_dataloader()))    # targets are -100 in the first half

    Args:
        length: of 0 w 0 w; the paper's is 1,024.
        vocab: number of symbols, of which words have all but 0; the paper's words have 1 to 127.
        epoch: number of steps in an epoch; each epoch has new words.
        batch_size: number of words in a batch.
        held_out: number of words of validation and of test.
        num_workers: number of processes that load.
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
        if epoch < 1 or held_out < 1:
            raise ValueError(f"epoch={epoch}, held_out={held_out}: pass 1 or more")
        self.vocab = vocab

    def setup(self, stage: str | None = None) -> None:
        """Make the parts; validation and test have fixed words."""
        sizes = {"train": self.hparams["epoch"] * self.hparams["batch_size"]}
        sizes |= dict.fromkeys(("val", "test"), self.hparams["held_out"])
        seeds = {"train": None, "val": 1, "test": 2}
        self.parts = {
            part: Words(size, self.hparams["length"], self.hparams["vocab"], seeds[part])
            for part, size in sizes.items()
        }


class Images(Dataset[list[Tensor]]):
    """Images as rows of bytes, from arrays mapped into memory."""

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
    """Images of 64 x 64 pixels, each a sequence of 12,288 bytes: red, green and blue of each pixel.

    >>> ImageNet64("data/imagenet64", batch_size=1)

    Args:
        folder: the folder of train*.npy and val*.npy, arrays of uint8, (images, 64, 64, 3).
        size: the images' height and width.
        batch_size: number of images in a batch.
        num_workers: number of processes that load.

    Raises:
        ValueError: if files are missing or have another shape.
    """

    def __init__(self, folder: str, size: int = 64, batch_size: int = 1, num_workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments of a network that depend on the data."""
        return {"vocab": self.vocab, "length": self.hparams["size"] ** 2 * 3}

    def setup(self, stage: str | None = None) -> None:
        """Map the arrays into memory."""
        folder, size = Path(self.hparams["folder"]).expanduser(), self.hparams["size"]
        for part in ("train", "val"):
            arrays = [np.load(file, mmap_mode="r") for file in sorted(folder.glob(f"{part}*.npy"))]
            if not arrays:
                raise ValueError(
                    f"data.folder={folder} has no {part}*.npy, arrays of uint8 (images, {size}, {size}, 3). Of the .npz"
                    " files of downsampled ImageNet, https://image-net.org/download-images, make them by"
                    " np.save(name, np.load(file)['data'].reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1))"
                )
            for array in arrays:
                if array.dtype != np.uint8 or math.prod(array.shape[1:]) != size**2 * 3:
                    raise ValueError(
                        f"data.folder={folder}: {part} has {array.dtype} of shape {list(array.shape)}, and needs"
                        f" uint8 of shape [images, {size}, {size}, 3]"
                    )
            self.parts[part] = Images(arrays)
        self.parts["test"] = self.parts["val"]  # on which the published figures were measured
