"""The cells of the matrix: each strategy beside the stock one, same seed, in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import lightning_revlib as revlib
from tests.strategies.helpers import BUILT, ENTRIES, PRECISIONS, Net, distance, outcome


class Sharded(Net):
    """As the stock ModelParallelStrategy asks for it."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for part in (*self.net, self):
            fully_shard(part, mesh=mesh)
        for name in ("training_step", "validation_step", "test_step", "predict_step"):
            register_fsdp_forward_method(self, name)


def sharded() -> Any:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


#     name: (reversible strategy, stock strategy)
STRATEGIES: dict[str, tuple[Any, Any]] = {
    "ddp": ("reversible", "ddp"),
    "ddp by instance": (lambda: revlib.ReversibleStrategy(), "ddp"),
    "ddp, unused": ("reversible_find_unused_parameters_true", "ddp_find_unused_parameters_true"),
    "ddp, static": (
        lambda: revlib.ReversibleStrategy(static_graph=True),
        lambda: L.pytorch.strategies.DDPStrategy(static_graph=True),
    ),
    "callback": ("ddp", "ddp"),
    "fsdp": ("reversible_fsdp", sharded),
    "fsdp beside ddp": ("reversible_fsdp", "ddp"),
    "spawn": ("reversible_spawn", "ddp_fork"),  # which starts faster than "ddp_spawn"
    "fork": ("reversible_fork", "ddp_fork"),
}
GROUPS = {
    "ranks": ["ddp", "ddp by instance", "ddp, unused", "ddp, static", "callback", "fsdp", "fsdp beside ddp"],
    "spawn": ["spawn"],  # processes start anew for each run
    "start methods": ["spawn", "fork"],
}
REFERENCE = ("ddp", "64-true", "fit", "init")  # the stock outcome that spawned processes are compared with


def cells(group: str) -> list[tuple[str, str, str, str]]:
    """Return (strategy, precision, entry, method that builds the stack) of each cell."""
    if group == "spawn":
        return [("spawn", "64-true", "fit", "init")]
    if group == "start methods":
        each = [("32-true", "fit"), ("bf16-mixed", "fit"), ("32-true", "validate"), ("32-true", "test")]
        # Trained parameters come back to the main process's module, which must have been built: not in `setup`.
        found = [(name, *which, built) for name in GROUPS[group] for which in each for built in BUILT[:2]]
        return [cell for cell in found if cell[2] != "fit" or cell[3] == "init"]
    first, *others = GROUPS[group]
    found = [(first, p, e, b) for p in PRECISIONS for e in ENTRIES for b in BUILT if e == "fit" or b == "init"]
    for name in others:
        supported = [p for p in PRECISIONS if "fsdp" not in name or p != "64-true" or name == "fsdp beside ddp"]
        found += [(name, p, "fit", "init") for p in supported]
        found += [(name, "32-true", e, "init") for e in ENTRIES[1:]]
    return found


def run_cell(out: Path, cell: tuple[str, str, str, str], is_ours: bool) -> Any:
    """Return the outcome of a cell with the reversible strategy, or with the stock one."""
    name, precision, entry, built = cell
    strategy = STRATEGIES[name][0 if is_ours else 1]
    cls = Sharded if strategy is sharded else Net
    return outcome(
        out,
        strategy() if callable(strategy) else strategy,
        entry,
        lambda: cls(built),
        is_ours and name not in GROUPS["start methods"],  # these never swap the main process's module
        devices=2,
        precision=precision,
        callbacks=[revlib.ReversibleCallback()] if is_ours and name == "callback" else [],
    )


def main(out: Path, group: str, reference: str | None = None) -> None:
    """Save, for each cell of a group, how far apart the outcomes of the two strategies are."""
    distances: dict[Any, float] = {}
    stock: dict[Any, Any] = {}  # outcomes, shared by the cells with the same stock strategy
    for cell in cells(group):
        name, *rest = cell
        key = (STRATEGIES[name][1], *rest)
        if key not in stock and reference is not None:
            expected = torch.load(reference, weights_only=True)
            stock[key] = {name: value.float() for name, value in expected.items()}  # as spawned processes return them
        elif key not in stock:
            stock[key] = run_cell(out, cell, is_ours=False)
        distances[cell] = distance(run_cell(out, cell, is_ours=True), stock[key])
        if cell == REFERENCE and torch.distributed.get_rank() == 0:
            torch.save(stock[key], out / "reference.pt")
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(distances, out / "result.pt")
