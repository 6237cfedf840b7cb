"""A training that is killed ten times, and one that is not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import fsspec.implementations.local as local
import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

import lightning_revlib as revlib
from tests.strategies.helpers import Net, data, trainer

EPOCHS, STEPS = 5, 30
PHASES = ("forward", "backward", "optimizer step", "checkpoint", "validation")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(Callback):
    """Kill the process in a phase of a step."""

    def __init__(self, step: int, phase: str) -> None:
        self.step, self.phase = step, phase

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step != self.step:
            return
        block = pl_module.net[2]
        if self.phase == "forward":
            block.register_forward_hook(lambda *_: die())
        elif self.phase == "backward":
            block[1].weight.register_hook(lambda _: die())
        elif self.phase == "optimizer step":
            trainer.optimizers[0].register_step_post_hook(lambda *_: die())
        elif self.phase == "validation":
            block.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else die())
        else:
            write = local.LocalFileOpener.write

            def write_half(self: Any, content: bytes) -> None:
                write(self, content[: len(content) // 2])
                die()

            local.LocalFileOpener.write = write_half


def train(folder: Path, killer: Callback | None) -> None:
    """Train from the last checkpoint, or from the start if there is none."""
    L.seed_everything(5, verbose=False)
    net = Net()
    save = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True, save_on_train_epoch_end=False)
    run = trainer(
        folder,
        strategy="reversible",
        max_epochs=EPOCHS,
        enable_checkpointing=True,
        callbacks=[save, revlib.ExactResume(), *([killer] if killer else [])],
    )
    last = folder / "last.ckpt"
    loader = DataLoader(data().dataset, batch_size=8, shuffle=True)
    run.fit(net, loader, data(), ckpt_path=last if last.exists() else None, weights_only=True)
    assert run.global_step == STEPS
    torch.save({**net.state_dict(), "steps": torch.tensor(run.global_step)}, folder / "end.pt")


def train_in_child(folder: Path, killer: Callback | None = None, seconds: float | None = None) -> int:
    """Train in a child process, kill it after some `seconds` if they are given, and return its exit status."""
    if (pid := os.fork()) == 0:
        train(folder, killer)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(out: Path, seed: int) -> None:
    """Save whether both trainings end with the same bits, and where the kills hit."""
    choose, hits = random.Random(seed), []
    start = time.perf_counter()
    assert train_in_child(out / "never") == 0
    whole = time.perf_counter() - start
    killed, done = out / "killed", 0
    for number in range(20):
        if len(hits) == 10:
            break
        if number % 3 == 2:
            seconds = choose.uniform(0.3, 1.0) * whole / 3
            status = train_in_child(killed, seconds=seconds)
            hits += [[f"after {seconds:.2f} s", 0, status]] if status else []  # none if it had finished before
        else:
            step, phase = choose.randint(done, min(done + 4, STEPS - 1)), choose.choice(PHASES)
            status = train_in_child(killed, Killer(step, phase))
            hits.append([phase, step, status])
        last = killed / "last.ckpt"
        done = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
        if done >= STEPS - 2:  # start over, to be killed at other points
            (killed / f"before-{number}").mkdir(parents=True, exist_ok=True)
            shutil.move(last, killed / f"before-{number}")
            done = 0
    assert train_in_child(killed) == 0
    ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (out / "never", killed)]
    equal = all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    torch.save({"equal": equal, "hits": hits, "keys": list(ends[0]) == list(ends[1])}, out / "result.pt")
