"""Text on which language models train; each byte is a token, unless a tokenizer is given.

Topics      Python's own manual, 466 kB of English, bundled with Python
TextFile    a file of your own, compressed by gzip or not
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

from lightning_revlib.pretrained.load import absolute
from lightning_revlib.recipes.data.documents import read_json_lines, tokenize


class SequenceData(L.LightningDataModule):
    """Base of the data of sequences; `setup` sets `parts`.

    All subclasses take `batch_size`, the number of sequences in a batch, and `num_workers`, the number of processes
    that load them.
    """

    vocab = 256

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Dataset[Any]] = {}
        self.known: dict[str, float] = {}  # metrics of simpler models on the held-out part, to compare with

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments of a network that depend on the data."""
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
        if part == "train" and size > (count := len(self.parts[part])):  # type: ignore[arg-type]
            raise ValueError(f"batch_size={size}: the data for training are {count} sequences; take as many at most")
        return DataLoader(
            self.parts[part], batch_size=size, num_workers=workers, persistent_workers=workers > 0, **options
        )


class Windows(Dataset[list[Tensor]]):
    """Pieces of one length from a row of tokens, one after the other.

    With `shifted`, each piece begins later by a random number of tokens below the length. Processes that draw the same
    random numbers still get different pieces, since their samplers give them different indices.
    """

    def __init__(self, data: Tensor, length: int, *, shifted: bool = False) -> None:
        self.data, self.length, self.shifted = data, length, shifted

    def __len__(self) -> int:
        return len(self.data) // self.length

    def __getitem__(self, index: int) -> list[Tensor]:
        if index >= len(self):
            raise IndexError(index)
        start = index * self.length
        if self.shifted:  # past the end, pieces continue at the beginning
            start = (start + int(torch.randint(self.length, ()))) % (len(self.data) - self.length + 1)
        return [self.data[start : start + self.length].long()]


class Text(SequenceData):
    """A row of tokens, of which the first 90 % train, 5 % choose the checkpoint and the last 5 % are held out.

    Training shifts each window at random; an epoch has as many windows as lie one after the other. Tokens are bytes
    or, with `tokenizer`, those of the pretrained model that it names, as in `load_tokenizer`.
    """

    def __init__(
        self, length: int = 512, batch_size: int = 16, num_workers: int = 0, tokenizer: str | None = None
    ) -> None:
        super().__init__()
        tokenizer = absolute(tokenizer)  # for checkpoints
        self.save_hyperparameters()

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Return the arguments of a network that depend on the data."""
        if (tokenizer := self.hparams["tokenizer"]) is None:
            return super().model_arguments
        return {"tokenizer": tokenizer, "length": self.hparams["length"]}

    def read(self) -> Tensor:
        """Return all bytes as uint8."""
        raise NotImplementedError

    def documents(self) -> list[str]:
        """Return the texts that a tokenizer reads. Raises UnicodeDecodeError."""
        return [self.read().numpy().tobytes().decode()]

    def setup(self, stage: str | None = None) -> None:
        """Divide the tokens into windows, once."""
        if self.parts:
            return
        tokenizer, length = self.hparams["tokenizer"], self.hparams["length"]
        data = self.read() if tokenizer is None else tokenize(self.documents(), tokenizer)
        unit = "bytes" if tokenizer is None else "tokens"
        self.size = len(data)
        train, val = len(data) * 90 // 100, len(data) * 95 // 100
        if length < 1 or len(data) - val < length:
            raise ValueError(
                f"length={length}: 5 % of {len(data)} {unit} are held out, which is less than one sequence; take a"
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

    The text varies with Python's version; `sha256` identifies it and is logged. `known` has the bits per byte of two
    simpler models: single bytes by their frequency, and bz2 of the whole text.
    """

    def read(self) -> Tensor:
        """Return the manual's bytes."""
        from pydoc_data.topics import topics

        text = "\n".join(topics.values()).encode()
        self.sha256 = hashlib.sha256(text).hexdigest()
        return torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def setup(self, stage: str | None = None) -> None:
        """Divide the text, and compute the metrics of simpler models."""
        if self.parts:
            return
        super().setup(stage)
        if self.hparams["tokenizer"] is None:
            self.known = self._known()
        for logger in self.trainer.loggers if self.trainer else ():
            logger.log_hyperparams({"sha256": self.sha256})

    def _known(self) -> dict[str, float]:
        train, val, test = (self.parts[part].data for part in ("train", "val", "test"))  # type: ignore[attr-defined]
        frequency = (train.bincount(minlength=256) + 1) / (len(train) + 256)
        whole = torch.cat((train, val, test)).numpy().tobytes()
        return {
            "unigram": -frequency.log2()[test.long()].mean().item(),
            "bz2": 8 * len(bz2.compress(whole)) / len(whole),
        }


class TextFile(Text):
    """Any file, byte by byte, or in a pretrained model's tokens.

    >>> TextFile("book.txt", length=1024, batch_size=8)
    >>> TextFile("chats.jsonl", length=1024, batch_size=8, tokenizer="my_model", key="content")

    The file is mapped into memory, so that a large file takes none. A file with the suffix .gz is read and unpacked.
    With a tokenizer, each line of a file named .jsonl or .jsonl.gz is an object of JSON, whose text is under `key`; the
    tokenizer's end-of-text token stands between the texts.

    Raises:
        ValueError: if the file does not exist, or is too short.
    """

    source = ""  # the end of the error if the file does not exist

    def __init__(
        self,
        path: str,
        length: int = 512,
        batch_size: int = 16,
        num_workers: int = 0,
        tokenizer: str | None = None,
        key: str = "text",
    ) -> None:
        tokenizer = absolute(tokenizer)
        super().__init__(length, batch_size, num_workers, tokenizer)
        self.save_hyperparameters()

    def documents(self) -> list[str]:
        """Return the file's text, or the text of each line of JSON; ValueError for other files."""
        path = self.hparams["path"]
        try:
            texts = super().documents()
        except UnicodeDecodeError as error:
            raise ValueError(f"data.path={path} is no text in UTF-8 ({error.reason} at byte {error.start})") from error
        is_json = str(path).removesuffix(".gz").endswith(".jsonl")
        return read_json_lines(texts[0], self.hparams["key"], path) if is_json else texts

    def read(self) -> Tensor:
        """Return the file's bytes."""
        path = Path(self.hparams["path"]).expanduser()
        if not path.is_file():
            zipped = path.with_name(path.name + ".gz")
            hint = f"; there is {zipped}" if zipped.is_file() else self.source
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
    """The first 10^8 bytes of the English Wikipedia of March 2006, in the usual parts of 90, 5 and 5 million.

    >>> Enwik8("data/enwik8", length=65536, batch_size=1)
    """

    source = "; get it from https://mattmahoney.net/dc/enwik8.zip, and unpack it there"

    def setup(self, stage: str | None = None) -> None:
        """Divide the text; ValueError if its size is not enwik8's."""
        super().setup(stage)
        if self.size != 10**8:
            raise ValueError(
                f"data.path={self.hparams['path']} has {self.size} bytes, and enwik8 100000000;"
                " data=text_file takes any file"
            )
