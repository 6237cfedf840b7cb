"""The digits: real, divided once and for all."""

from __future__ import annotations

import torch

from lightning_revlib.recipes.data import Digits


def test_parts_are_of_the_promised_size_and_do_not_overlap():
    data = Digits()
    data.setup()
    images = {part: data.parts[part].tensors[0] for part in ("train", "val", "test")}
    assert {part: len(x) for part, x in images.items()} == {"train": 1293, "val": 144, "test": 360}
    assert len({tuple(x.flatten().tolist()) for part in images.values() for x in part}) == 1797
    assert all(x.shape[1:] == Digits.SHAPE and x.min() == 0 and x.max() == 1 for x in images.values())


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
        share = part.tensors[1].bincount(minlength=Digits.CLASSES) / len(part)
        assert share.min() > 0.08 and share.max() < 0.12


def test_batches():
    data = Digits(batch_size=16)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (16, 1, 8, 8) and labels.shape == (16,) and labels.dtype == torch.long
    untouched, _ = data.on_after_batch_transfer([images, labels], 0)
    assert torch.equal(untouched, images)  # jitter is for training only
