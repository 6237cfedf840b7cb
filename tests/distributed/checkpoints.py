"""Checkpoints from every strategy into every strategy, in two processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch

import lightning_revlib as revlib
from tests.strategies.helpers import Net, data, distance, trainer, whole

#     name: (strategy, processes)
STRATEGIES: dict[str, tuple[Any, int]] = {
    "plain": (lambda: "auto", 1),
    "reversible": (lambda: "reversible", 1),
    "ddp": (lambda: "reversible", 2),
    "fsdp, shards": (lambda: revlib.ReversibleFSDPStrategy(), 2),
    "fsdp, one file": (lambda: revlib.ReversibleFSDPStrategy(save_distributed_checkpoint=False), 2),
}
KINDS = list(STRATEGIES)
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2),
}
SAVED = {"adam": 4, "sgd": 6}  # in the middle of an epoch, and at its end


def kinds(optimizer: str) -> list[str]:
    """Return the strategies whose checkpoints with this optimizer are to be tested."""
    return KINDS if optimizer == "adam" else [kind for kind in KINDS if kind != "ddp"]


class Same(Net):
    """Trains to the same parameters on one process and on two: no dropout, and each process sees all batches."""

    def __init__(self, optimizer: str) -> None:
        self.optimizer = optimizer
        super().__init__(dropout=0.0)

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


def run(kind: str, optimizer: str, steps: int, out: Path, start: Path | None = None) -> tuple[Any, Any]:
    """Train up to a number of steps, from a checkpoint if there is one; return the module and its Trainer."""
    L.seed_everything(5, verbose=False)
    strategy, processes = STRATEGIES[kind]
    net = Same(optimizer)
    options = {"use_distributed_sampler": False, "max_epochs": 10, "precision": "32-true"}
    fit = trainer(out, strategy=strategy(), devices=processes, max_steps=steps, **options)
    fit.fit(net, data(), ckpt_path=start)
    return net, fit


def main(out: Path) -> None:
    """Save, for each pair, how far the run that resumes is from one of the stock strategy that does so."""
    rank = int(os.environ["LOCAL_RANK"])
    distances: dict[Any, Any] = {}
    for optimizer in OPTIMIZERS:
        paths = {}
        for kind in kinds(optimizer):
            _, fit = run(kind, optimizer, SAVED[optimizer], out)
            own = f"-{rank}" if STRATEGIES[kind][1] == 1 else ""  # each process runs a strategy for one by itself
            paths[kind] = out / f"{kind}-{optimizer}{own}.ckpt"
            fit.save_checkpoint(paths[kind])
        expected = whole(run("plain", optimizer, 9, out, paths["plain"])[0].state_dict())
        for then in kinds(optimizer):
            for first in kinds(optimizer):
                if first == "fsdp, shards" and then == "plain":
                    continue  # the stock strategy reads files only
                net, fit = run(then, optimizer, 9, out, paths[first])
                assert fit.global_step == 9
                distances[optimizer, first, then] = distance(whole(net.state_dict()), expected)
    if rank == 0:
        file = out / "fsdp, one file-adam.ckpt"
        loaded = Same.load_from_checkpoint(file, optimizer="adam", weights_only=True)
        distances["loaded"] = type(loaded.net).__name__
        merged = revlib.merge_checkpoint(out / "fsdp, shards-adam.ckpt")
        full = torch.load(file, weights_only=True)
        keys = list(Same("adam").state_dict())
        distances["keys"] = [list(full["state_dict"]) == keys, sorted(merged["state_dict"]) == sorted(keys)]
        torch.save(distances, out / "result.pt")
