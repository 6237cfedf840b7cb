"""Killed, failing and interrupted runs."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_revlib as revlib
from tests.distributed.pair import run, start
from tests.test_strategy import Net, data, trainer


@pytest.mark.parametrize("seed", [1, *(pytest.param(s, marks=pytest.mark.slow) for s in range(2, 6))])
def test_ten_kills_change_no_bit(tmp_path: Path, seed: int) -> None:
    found = run("killed.py", tmp_path, seed)
    assert [status for *_, status in found["hits"]] == [-signal.SIGKILL] * 10
    assert found["equal"] and found["keys"]


@pytest.mark.parametrize(
    ("rank", "how"),
    [
        pytest.param(1, "kill"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, "kill"), (0, "raise"), (1, "raise")]),
    ],
)
def test_a_rank_that_dies_ends_the_others_with_a_message(tmp_path: Path, rank: int, how: str) -> None:
    began = time.monotonic()
    process = start("dying.py", tmp_path, rank, how)
    output, _ = process.communicate(timeout=120)  # ends when all that hold the pipe have ended
    assert process.returncode != 0 and time.monotonic() - began < 120
    if how == "raise":
        assert "this rank fails" in output
    else:
        assert "terminated with code" in output or "Connection closed by peer" in output or "reset by peer" in output


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
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] >= 2 and list(checkpoint["state_dict"]) == keys
    again = Net()
    trainer(tmp_path, strategy="reversible").fit(again, data(), ckpt_path=tmp_path / "last.ckpt")
    net(data().dataset[:8][0]).sum().backward()


class Exhausts(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("by", ["strategy", "callback"])
@pytest.mark.parametrize("store", [0, 2])
def test_out_of_memory_names_the_way_out(tmp_path: Path, by: str, store: int) -> None:
    targets = {"net": {"store_last": store}}
    options: dict[str, Any] = {"strategy": revlib.ReversibleStrategy(targets)}
    if by == "callback":
        options = {"callbacks": [revlib.ReversibleCallback(targets)]}
    message = (
        "net: 2 of 5 blocks keep activations: give them a smaller memory_budget or store_last"
        if store
        else "hold their output"
    )
    with pytest.raises(torch.OutOfMemoryError, match=f"(?s)CUDA out of memory.*{message}.*revlib.report"):
        trainer(tmp_path, **options).fit(Exhausts(), data())


class Huge(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return torch.empty(1 << 60).sum()


def test_out_of_memory_on_the_host_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)allocate.*reversible stacks: all stacks hold their output only"):
        trainer(tmp_path, strategy="reversible").fit(Huge(), data())


class ExhaustsLater(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().training_step(batch, batch_idx)


def test_out_of_memory_counts_what_a_plan_stores(tmp_path: Path) -> None:
    strategy = revlib.ReversibleStrategy(memory_budget=1.0)
    message = "net: 5 of 5 steps keep activations: by their memory plan; take a smaller memory_budget"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        trainer(tmp_path, strategy=strategy).fit(ExhaustsLater(), data())
