"""The reversible strategy gives what the stock strategy gives: losses, parameters, metrics, checkpoints."""

from __future__ import annotations

import signal
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_revlib as revlib
from tests.strategies.helpers import (
    BUILT,
    ENTRIES,
    PRECISIONS,
    TOLERANCES,
    Net,
    data,
    distance,
    fit,
    outcome,
    trainer,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the function from the method that builds the stack to the module that the stock strategy has trained."""
    return cache(lambda built: fit(tmp_path_factory.mktemp("plain"), "auto", lambda: Net(built), precision="64-true"))


@pytest.mark.parametrize("built", BUILT)
@pytest.mark.parametrize("by", ["name", "instance", "callback"])
def test_the_loss_curve_is_that_of_the_stock_strategy(tmp_path: Path, plain: Any, by: str, built: str) -> None:
    strategy = {"name": "reversible", "instance": revlib.ReversibleStrategy()}.get(by, "auto")
    callbacks = [revlib.ReversibleCallback()] if by == "callback" else []
    expected = plain(built)
    found = fit(tmp_path, strategy, lambda: Net(built), precision="64-true", callbacks=callbacks)
    assert type(expected.net) is revlib.CoupledSequential and type(found.net) is revlib.ReversibleSequential
    assert len(expected.losses) == 12
    for stock, loss in zip(expected.losses, found.losses, strict=True):
        assert loss.item() == pytest.approx(stock.item(), rel=1e-10)
    states = [net.state_dict() for net in (expected, found)]
    for (name, tensor), (other, value) in zip(*[state.items() for state in states], strict=True):
        assert name == other and torch.allclose(tensor, value, rtol=1e-9, atol=1e-12)


CELLS = [(p, e, b) for p in PRECISIONS for e in ENTRIES for b in BUILT if e == "fit" or b == "init"]


@pytest.mark.parametrize(("precision", "entry", "built"), CELLS, ids="-".join)
def test_precisions_and_entries(tmp_path: Path, precision: str, entry: str, built: str) -> None:
    swapped = {"auto": False, "reversible": True}
    expected, found = (
        outcome(tmp_path, strategy, entry, lambda: Net(built), is_swapped, precision=precision)
        for strategy, is_swapped in swapped.items()
    )
    assert distance(found, expected) <= (TOLERANCES[precision] if entry == "fit" else 1e-6)


@pytest.mark.parametrize("entry", ENTRIES[1:])
def test_entries_without_fit_swap_as_well(tmp_path: Path, entry: str) -> None:
    net = Net()
    getattr(trainer(tmp_path, strategy="reversible"), entry)(net, data())
    assert type(net.net) is revlib.ReversibleSequential


def test_checkpoints_go_both_ways_and_into_a_plain_module(tmp_path: Path) -> None:
    paths = {}
    for strategy in ("auto", "reversible"):
        L.seed_everything(5, verbose=False)
        run = trainer(tmp_path, strategy=strategy, max_epochs=1)
        run.fit(Net(), data())
        paths[strategy] = tmp_path / f"{strategy}.ckpt"
        run.save_checkpoint(paths[strategy])
    states = {name: torch.load(path, weights_only=True) for name, path in paths.items()}
    assert list(states["auto"]["state_dict"]) == list(states["reversible"]["state_dict"]) == list(Net().state_dict())
    curves = []
    for start in ("auto", "reversible"):
        for then in ("auto", "reversible"):
            net = Net()
            torch.manual_seed(6)
            trainer(tmp_path, strategy=then, max_epochs=2).fit(net, data(), ckpt_path=paths[start], weights_only=True)
            curves.append([loss.item() for loss in net.losses])
    assert all(len(curve) == 6 and curve == pytest.approx(curves[0], rel=1e-4) for curve in curves)
    loaded = Net.load_from_checkpoint(paths["reversible"])
    assert type(loaded.net) is revlib.CoupledSequential


def test_fitting_twice_and_after_validation(tmp_path: Path) -> None:
    net = Net()
    trainer(tmp_path, strategy="reversible").validate(net, data(), verbose=False)
    trainer(tmp_path, strategy="reversible").fit(net, data(), data())
    trainer(tmp_path, strategy="auto").fit(net, data())
    assert len(net.losses) == 24


def test_restore_at_the_end(tmp_path: Path) -> None:
    net = fit(tmp_path, revlib.ReversibleStrategy(restore=True), max_epochs=1)
    assert type(net.net) is revlib.CoupledSequential


class Interrupted(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 3:
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)


def test_keyboard_interrupt_leaves_a_checkpoint_and_a_whole_module(tmp_path: Path) -> None:
    net, before = Interrupted(), signal.getsignal(signal.SIGINT)
    keys = list(net.state_dict())
    run = trainer(
        tmp_path,
        strategy=revlib.ReversibleStrategy(restore=True, optimizer_in_backward=True),
        enable_checkpointing=True,
        callbacks=[ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True, every_n_train_steps=2)],
    )
    try:
        with pytest.raises(SystemExit):
            run.fit(net, data())
    finally:
        signal.signal(signal.SIGINT, before)
    assert type(net.net) is revlib.CoupledSequential and list(net.state_dict()) == keys
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] >= 2 and list(checkpoint["state_dict"]) == keys
    again = Net()
    trainer(tmp_path, strategy="reversible").fit(again, data(), ckpt_path=tmp_path / "last.ckpt")
    net.zero_grad()
    net(data().dataset[:8][0]).sum().backward()
    assert all(p.grad is not None for p in net.parameters())  # no hook is left that would step and free
