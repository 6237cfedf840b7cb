"""Checkpoints from every strategy into every strategy, in two processes.

python checkpoints.py OUT     saves, for each pair, how far the run that goes on is from one of the stock strategy
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch

import lightning_revlib as revlib
from tests.test_strategy import Net, data, trainer

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
    return KINDS if optimizer == "adam" else [kind for kind in KINDS if kind != "ddp"]


class Same(Net):
    """Trains alike on one process and on two: no dropout, and all see the whole batch."""

    def __init__(self, optimizer: str) -> None:
        self.optimizer = optimizer
        super().__init__(dropout=0.0)

    def configure_optimizers(self) -> Any:
        return OPTIMIZERS[self.optimizer](self.parameters())


def run(kind: str, optimizer: str, steps: int, out: Path, start: Path | None = None) -> tuple[Any, Any]:
    L.seed_everything(5, verbose=False)
    strategy, processes = STRATEGIES[kind]
    net = Same(optimizer)
    options = {"use_distributed_sampler": False, "max_epochs": 10, "precision": "32-true"}
    fit = trainer(out, strategy=strategy(), devices=processes, max_steps=steps, **options)
    fit.fit(net, data(), ckpt_path=start)
    return net, fit


def whole(net: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(t, "full_tensor", lambda t=t: t)().detach() for name, t in net.state_dict().items()}


def main(out: Path) -> None:
    rank = int(__import__("os").environ.get("LOCAL_RANK", 0))
    distances: dict[Any, Any] = {}
    run("ddp", "sgd", 1, out)  # starts the second process
    for optimizer in OPTIMIZERS:
        paths = {}
        for kind in kinds(optimizer):
            _, fit = run(kind, optimizer, SAVED[optimizer], out)
            alone = STRATEGIES[kind][1] == 1
            paths[kind] = out / f"{kind}-{optimizer}{f'-{rank}' if alone else ''}.ckpt"
            fit.save_checkpoint(paths[kind])
        expected = whole(run("plain", optimizer, 9, out, paths["plain"])[0])
        for then in kinds(optimizer):
            for first in kinds(optimizer):
                if first == "fsdp, shards" and then == "plain":
                    continue  # the stock strategy reads files only
                net, fit = run(then, optimizer, 9, out, paths[first])
                found = whole(net)
                assert list(found) == list(expected) and fit.global_step == 9
                apart = max((found[name].double() - expected[name].double()).abs().max().item() for name in found)
                distances[optimizer, first, then] = apart
    if rank == 0:
        file = out / "fsdp, one file-adam.ckpt"
        loaded = Same.load_from_checkpoint(file, optimizer="adam", weights_only=True)
        distances["loaded"] = type(loaded.net).__name__
        merged = revlib.merge_checkpoint(out / "fsdp, shards-adam.ckpt")
        full = torch.load(file, weights_only=True)
        keys = list(Same("adam").state_dict())
        distances["keys"] = [list(full["state_dict"]) == keys, sorted(merged["state_dict"]) == sorted(keys)]
        torch.save(distances, out / "result.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
