"""Text, divided into parts and mapped into memory, and other sequences."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch

from lightning_revlib.recipes.data.sequences import Duplication, ImageNet64
from lightning_revlib.recipes.data.text import Enwik8, TextFile, Topics


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(i % 251 for i in range(10_000)))
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_is_divided_90_5_5(book, tmp_path, compressed):
    if compressed:
        data = book.read_bytes()
        book = tmp_path / "book.gz"
        book.write_bytes(gzip.compress(data))
    data = TextFile(str(book), length=100, batch_size=7)
    data.setup()
    sizes = {part: len(windows.data) for part, windows in data.parts.items()}
    assert sizes == {"train": 9000, "val": 500, "test": 500}
    assert [len(data.parts[part]) for part in ("train", "val", "test")] == [90, 5, 5]
    (tokens,) = next(iter(data.train_dataloader()))
    assert tokens.shape == (7, 100) and tokens.dtype == torch.long
    assert ((tokens[:, 1:] - tokens[:, :-1]) % 251 == 1).all() and len(set(tokens[:, 0].tolist())) > 2
    held_out = torch.cat([tokens for (tokens,) in data.test_dataloader()]).flatten()
    assert torch.equal(held_out, torch.arange(9500, 10_000) % 251)  # all of it, in order
    assert data.model_arguments == {"vocab": 256, "length": 100}


def test_a_file_that_is_not_compressed_is_mapped_into_memory(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**33)  # 8 GiB of which nothing is on the disk
    data = TextFile(str(path), length=2**20)
    data.setup()
    assert len(data.parts["train"].data) == 2**33 * 90 // 100


def test_topics_know_the_metrics_of_simpler_models():
    data = Topics(length=256)
    data.setup()
    assert 4.5 < data.known["unigram"] < 5 and 1.5 < data.known["bz2"] < 1.9
    assert len(data.sha256) == 64 and 400_000 < data.size < 700_000


def test_duplication():
    data = Duplication(length=64, vocab=16, epoch=3, batch_size=4, held_out=8)
    data.setup()
    tokens, targets = next(iter(data.train_dataloader()))
    assert tokens.shape == targets.shape == (4, 64)
    assert torch.equal(tokens[:, :32], tokens[:, 32:]) and not tokens[:, ::32].any() and (tokens[:, 1:32] > 0).all()
    assert (targets[:, :32] == -100).all() and torch.equal(targets[:, 32:], tokens[:, 32:])
    assert tokens.max() < 16 and len(data.train_dataloader()) == 3
    one, other = ([t for t, _ in data.parts[part]] for part in ("val", "test"))
    assert torch.equal(torch.stack(one), torch.stack([t for t, _ in data.parts["val"]]))
    assert not torch.equal(torch.stack(one), torch.stack(other))


@pytest.mark.parametrize(
    "make", [lambda: Duplication(length=64, batch_size=4), lambda: Topics(length=64, batch_size=4)]
)
def test_processes_with_the_same_random_numbers_train_on_different_data(make):
    seen = []
    for index in (0, 1, 0):  # of the last, the next epoch
        data = make()
        data.setup()
        torch.manual_seed(0)
        if len(seen) == 2:
            data.parts["train"][0]
        seen.append(data.parts["train"][index][0])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    torch.manual_seed(0)
    assert torch.equal(data.parts["train"][0][0], seen[0])  # what `ExactResume` relies on


def test_images_are_bytes_pixel_by_pixel(tmp_path):
    arrays = [np.random.default_rng(i).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8) for i in range(3)]
    for name, array in zip(("train_1", "train_2", "val"), arrays, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    data = ImageNet64(str(tmp_path), size=4, batch_size=2)
    data.setup()
    assert len(data.parts["train"]) == 6 and len(data.parts["test"]) == 3
    assert data.parts["train"][4][0].tolist() == arrays[1][1].flatten().tolist()
    assert next(iter(data.val_dataloader()))[0].shape == (2, 48) and data.model_arguments["length"] == 48


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: TextFile(str(folder / "none")), "none does not exist"),
        (lambda folder: TextFile(str(folder / "there")), "there does not exist; there is .*there.gz"),
        (lambda folder: TextFile(str(folder)), "is a folder"),
        (lambda folder: TextFile(str(folder / "a.zip")), "unpack it first"),
        (lambda folder: TextFile(str(folder / "there.gz")), "is not compressed by gzip"),
        (lambda folder: TextFile(str(folder / "empty")), "empty is empty"),
        (lambda folder: TextFile(str(folder / "short"), length=100), "length=100: 5 % of 1000 bytes .* from 1 to 50"),
        (lambda folder: Enwik8(str(folder / "enwik8")), "does not exist; get it from https://mattmahoney.net"),
        (lambda folder: Enwik8(str(folder / "short"), length=10), "has 1000 bytes, and enwik8 100000000"),
        (lambda folder: Duplication(length=8, held_out=0), "held_out=0: pass 1 or more"),
        (lambda folder: Duplication(length=7), "length=7, vocab=128: pass an even length"),
        (lambda folder: ImageNet64(str(folder / "none")), r"has no train\*.npy, arrays of uint8 \(images, 64, 64, 3\)"),
        (lambda folder: ImageNet64(str(folder)), r"train has float64 of shape \[2, 64, 64, 3\], and needs uint8"),
    ],
)
def test_errors_of_missing_and_wrong_files(make, message, tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "there.gz").write_bytes(b"no gzip")
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_bytes(b"x" * 1000)
    np.save(tmp_path / "train.npy", np.zeros((2, 64, 64, 3)))
    with pytest.raises(ValueError, match=message):
        make(tmp_path).setup()
