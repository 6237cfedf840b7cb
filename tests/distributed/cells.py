"""The cells of the matrix: each strategy beside the stock one, same seed, in two processes where two are meant.

python cells.py OUT GROUP [REFERENCE]     runs the cells of a group and saves, for each, how far apart the two are
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import lightning_revlib as revlib
from tests.test_strategy import Net, data, trainer

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")
ENTRIES = ("fit", "validate", "test", "predict")
BUILT = ("init", "setup", "configure_model")
TOLERANCES = {"32-true": 1e-6, "64-true": 1e-12, "bf16-mixed": 4e-3, "bf16-true": 4e-3}


class Sharded(Net):
    """As the stock ModelParallelStrategy wants it."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for part in (*self.net, self):
            fully_shard(part, mesh=mesh)
        for name in ("training_step", "validation_step", "test_step", "predict_step"):
            register_fsdp_forward_method(self, name)


def sharded(**options: Any) -> Any:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **options)


#     name: (reversible strategy, stock strategy, processes)
STRATEGIES: dict[str, tuple[Any, Any, int]] = {
    "one": ("reversible", "auto", 1),
    "ddp": ("reversible", "ddp", 2),
    "ddp by instance": (lambda: revlib.ReversibleStrategy(), "ddp", 2),
    "ddp, unused": ("reversible_find_unused_parameters_true", "ddp_find_unused_parameters_true", 2),
    "ddp, static": (
        lambda: revlib.ReversibleStrategy(static_graph=True),
        lambda: L.pytorch.strategies.DDPStrategy(static_graph=True),
        2,
    ),
    "callback": ("ddp", "ddp", 2),
    "fsdp": ("reversible_fsdp", sharded, 2),
    "fsdp beside ddp": ("reversible_fsdp", "ddp", 2),
    "spawn": ("reversible_spawn", "ddp_spawn", 2),
    "fork": ("reversible_fork", "ddp_fork", 2),
}
SPAWNED = ("reversible_spawn", "ddp_spawn", "reversible_fork", "ddp_fork")  # the main process's module is never swapped
GROUPS = {
    "one": ["one"],
    "popen": ["ddp", "ddp by instance", "ddp, unused", "ddp, static", "callback", "fsdp", "fsdp beside ddp"],
    "spawn": ["spawn"],  # processes start anew for each run
    "start methods": ["spawn", "fork"],
}


REFERENCE = ("ddp", "64-true", "fit", "init")  # what spawned processes are compared with as well, to start fewer


def cells(group: str) -> list[tuple[str, str, str, str]]:
    """(strategy, precision, entry, where the module is built)"""
    if group == "spawn":
        return [("spawn", "64-true", "fit", "init")]
    if group == "start methods":
        each = [("32-true", "fit"), ("bf16-mixed", "fit"), ("32-true", "validate"), ("32-true", "test")]
        # What is trained comes back to a module that has it already: not to one that builds it in `setup`.
        found = [(name, *which, built) for name in GROUPS[group] for which in each for built in BUILT[:2]]
        return [cell for cell in found if cell[2] != "fit" or cell[3] == "init"]
    first, *others = GROUPS[group]
    found = [(first, p, e, b) for p in PRECISIONS for e in ENTRIES for b in BUILT if e == "fit" or b == "init"]
    for name in others:
        supported = [p for p in PRECISIONS if "fsdp" not in name or p != "64-true" or name == "fsdp beside ddp"]
        found += [(name, p, "fit", "init") for p in supported]
        found += [(name, "32-true", e, "init") for e in ENTRIES[1:]]
    return found


def outcome(strategy: Any, processes: int, precision: Any, entry: str, built: str, callback: bool, out: Path) -> Any:
    """All parameters after five steps, or what the entry gives."""
    L.seed_everything(5, verbose=False)
    cls = Sharded if strategy is sharded else Net
    net = cls(built)
    run = trainer(
        out,
        strategy=strategy() if callable(strategy) else strategy,
        devices=processes,
        precision=precision,
        max_steps=5,
        max_epochs=10,
        callbacks=[revlib.ReversibleCallback()] if callback else [],
    )
    keys = list(net.state_dict())
    if entry == "fit":
        run.fit(net, data(), data())
        assert list(net.state_dict())[: len(keys)] == keys
        swapped = isinstance(net.net, revlib.ReversibleSequential)
        assert swapped == (callback or "reversible" in type(run.strategy).__name__.lower()) or strategy in SPAWNED
        return {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in net.named_parameters()}
    if entry == "predict":
        return dict(enumerate(run.predict(net, data()) or []))
    (metrics,) = getattr(run, entry)(net, data(), verbose=False)
    return {name: torch.tensor(value) for name, value in metrics.items()}


def distance(found: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor]) -> float:
    assert list(found) == list(expected) and found
    pairs = zip(found.values(), expected.values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def main(out: Path, group: str, reference: str | None = None) -> None:
    distances = {}
    for cell in cells(group):
        name, precision, entry, built = cell
        ours, stock, processes = STRATEGIES[name]
        if reference is None:
            expected = outcome(stock, processes, precision, entry, built, False, out)
        else:
            expected = torch.load(reference, weights_only=True)
            expected = {k: v.float() for k, v in expected.items()}  # as they come back into the main process's module
        found = outcome(ours, processes, precision, entry, built, name == "callback", out)
        distances[cell] = distance(found, expected)
        if cell == REFERENCE and torch.distributed.get_rank() == 0:
            torch.save(expected, out / "reference.pt")
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(distances, out / "result.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
