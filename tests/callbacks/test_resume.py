"""A run that resumes with ExactResume ends with the bits of one that was not interrupted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset

import lightning_revlib as revlib
from tests.strategies.helpers import Net, data, trainer


class Noisy(Dataset[tuple[torch.Tensor]]):
    """Each sample is augmented by random numbers of torch, Python and NumPy."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[torch.Tensor]:
        (x,) = data().dataset[index]
        return (x + 0.1 * (torch.rand(8) + random.gauss(0, 1) + np.random.randn()),)  # these two draw pairs


def fit(tmp_path: Path, save: Any = None, ckpt: Any = None, loads: Any = None, **options: Any) -> list[torch.Tensor]:
    L.seed_everything(5, verbose=False)
    net = Net()
    callbacks = [revlib.ExactResume(), *([ModelCheckpoint(tmp_path, save_top_k=-1, **save)] if save else [])]
    strategy, loader = (
        options.pop("strategy", "reversible"),
        DataLoader(Noisy(), batch_size=8, shuffle=True, **(loads or {})),
    )
    if budget := options.pop("memory_budget", None):
        strategy = revlib.ReversibleStrategy(memory_budget=budget)
    run = trainer(tmp_path, strategy=strategy, callbacks=callbacks, enable_checkpointing=bool(save), **options)
    run.fit(net, loader, data(), ckpt_path=ckpt, weights_only=True)
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize(
    ("options", "save"),
    [
        ({"val_check_interval": 3}, {"every_n_train_steps": 1}),
        ({"accumulate_grad_batches": 2}, {"every_n_train_steps": 1}),
        ({}, {"every_n_epochs": 1}),
        ({"memory_budget": 0.7}, {"every_n_train_steps": 5}),
        ({"strategy": "auto"}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}),
    ],
    ids=str,
)
def test_from_every_checkpoint_the_same_end(tmp_path: Path, options: dict[str, Any], save: dict[str, Any]) -> None:
    expected = fit(tmp_path, save, **options)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 2
    for path in paths:
        found = fit(tmp_path, None, path, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), path.name


def test_persistent_workers_in_the_first_epoch(tmp_path: Path) -> None:
    loads = {"num_workers": 1, "persistent_workers": True}
    expected = fit(tmp_path, {"every_n_train_steps": 4}, loads=loads, max_epochs=1)
    found = fit(tmp_path, None, next(tmp_path.glob("*.ckpt")), loads=loads, max_epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_loader_with_a_generator_of_its_own_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="a loader has a generator of its own, whose state no checkpoint has"):
        fit(tmp_path, loads={"generator": torch.Generator()}, max_epochs=1)


def test_another_number_of_processes_is_said(tmp_path: Path) -> None:
    fit(tmp_path, {"every_n_epochs": 1}, max_epochs=1)
    (path,) = tmp_path.glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["revlib_resume"] *= 2
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="of 2 processes, this run has 1"):
        fit(tmp_path, None, path)
