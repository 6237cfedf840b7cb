"""The text on which language models train: bytes, of which each is a token.

Topics      Python's own manual, 466 kB of English, bundled with Python
TextFile    a file of one's own, compressed by gzip or not
Enwik8      100 MB of Wikipedia, a file to download
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class SequenceData(L.LightningDataModule):
    """What all data of sequences share. `parts` are set by `setup`.

    Args of all: `batch_size`, sequences a step, and `num_workers`, processes that load them.
    """

    vocab = 256

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Dataset[Any]] = {}
        self.known: dict[str, float] = {}  # what simpler models reach on the held-out part, to compare with

    @property
    def model_arguments(self) -> dict[str, Any]:
        return {"vocab": self.vocab, "length": self.hparams["length"]}

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", shuffle=True, drop_last=True)

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


class Windows(Dataset[list[Tensor]]):
    """Pieces of some length out of one row of bytes, one after the other.

    With `shifted`, each begins up to a length later, at random: processes whose random numbers are alike still get
    different pieces, as the sampler gives them different indices.
    """

    def __init__(self, data: Tensor, length: int, *, shifted: bool = False) -> None:
        self.data, self.length, self.shifted = data, length, shifted

    def __len__(self) -> int:
        return len(self.data) // self.length

    def __getitem__(self, index: int) -> list[Tensor]:
        if index >= len(self):
            raise IndexError(index)
        start = index * self.length
        if self.shifted:  # past the end it goes on at the beginning
            start = (start + int(torch.randint(self.length, ()))) % (len(self.data) - self.length + 1)
        return [self.data[start : start + self.length].long()]


class Text(SequenceData):
    """Bytes in a row: the first 90 % train, 5 % choose the checkpoint, the last 5 % are held out.

    Training shifts each window at random: as many in an epoch as there would be one after the other.
    """

    def __init__(self, length: int = 512, batch_size: int = 16, num_workers: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def read(self) -> Tensor:
        """All bytes, as uint8."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if self.parts:
            return
        data, length = self.read(), self.hparams["length"]
        self.size = len(data)
        train, val = len(data) * 90 // 100, len(data) * 95 // 100
        if length < 1 or len(data) - val < length:
            raise ValueError(
                f"length={length}: 5 % of {len(data)} bytes are held out, which is less than one sequence; take a"
                f" length from 1 to {max(1, len(data) // 20)}"
            )
        self.parts = {
            "train": Windows(data[:train], length, shifted=True),
            "val": Windows(data[train:val], length),
            "test": Windows(data[val:], length),
        }


class Topics(Text):
    """The manual that Python's `help()` shows: 466 kB of English about Python, bundled with it.

    >>> data = Topics(length=512, batch_size=16)
    >>> data.setup("fit")
    >>> (tokens,) = next(iter(data.train_dataloader()))     # (16, 512)

    It varies with Python's version: `sha256` tells which text it is, and is logged. `known` has
    the bits per byte of two simpler models: single bytes by their frequency, and bz2 of the whole text.
    """

    def read(self) -> Tensor:
        from pydoc_data.topics import topics

        text = "\n".join(topics.values()).encode()
        self.sha256 = hashlib.sha256(text).hexdigest()
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def setup(self, stage: str | None = None) -> None:
        if self.parts:
            return
        super().setup(stage)
        train, val, test = (self.parts[part].data for part in ("train", "val", "test"))  # type: ignore[attr-defined]
        frequency = (train.bincount(minlength=256) + 1) / (len(train) + 256)
        whole = torch.cat((train, val, test)).numpy().tobytes()
        self.known = {
            "unigram": -frequency.log2()[test.long()].mean().item(),
            "bz2": 8 * len(bz2.compress(whole)) / len(whole),
        }
        for logger in self.trainer.loggers if self.trainer else ():
            logger.log_hyperparams({"sha256": self.sha256})


class TextFile(Text):
    """A file, whatever is in it, byte by byte.

    >>> TextFile("book.txt", length=1024, batch_size=8)

    It is mapped into memory: a large one costs none. With the suffix .gz it is read and unpacked.

    Raises:
        ValueError: if there is no such file, or it is too short.
    """

    where = ""  # where to get it from

    def __init__(self, path: str, length: int = 512, batch_size: int = 16, num_workers: int = 0) -> None:
        super().__init__(length, batch_size, num_workers)
        self.save_hyperparameters()

    def read(self) -> Tensor:
        path = Path(self.hparams["path"]).expanduser()
        if not path.is_file():
            zipped = path.with_name(path.name + ".gz")
            hint = f"; there is {zipped}" if zipped.is_file() else self.where
            raise ValueError(f"data.path={path} {'is a folder' if path.is_dir() else 'does not exist'}{hint}")
        if path.suffix == ".zip":
            raise ValueError(f"data.path={path}: unpack it first, or compress it by gzip")
        if path.suffix == ".gz":
            try:
                return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8)
            except (OSError, EOFError) as error:
                raise ValueError(f"data.path={path} is not compressed by gzip, or damaged") from error
        if not (size := path.stat().st_size):
            raise ValueError(f"data.path={path} is empty")
        return torch.from_file(str(path), size=size, dtype=torch.uint8)


class Enwik8(TextFile):
    """The first 10^8 bytes of the English Wikipedia of March 2006; 90, 5 and 5 million are the usual parts.

    >>> Enwik8("data/enwik8", length=65536, batch_size=1)

    Also .gz.
    """

    where = "; get it from https://mattmahoney.net/dc/enwik8.zip, and unpack it there"

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self.size != 10**8:
            raise ValueError(
                f"data.path={self.hparams['path']} has {self.size} bytes, and enwik8 100000000;"
                " data=text_file takes any file"
            )
