"""The bytes of a step by owner in each of two processes, by DDP and by FSDP2: counted, and simulated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lightning_revlib as revlib
from tests.accounting.by_hand import by_hand


def build(way: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(6)]
    stack = revlib.ReversibleSequential(*blocks)
    model: Any = nn.Sequential(nn.Linear(8, 32), stack, nn.Linear(32, 1))
    if way == "ddp":
        model = DistributedDataParallel(model)
    else:
        for block in stack:
            fully_shard(block)
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), foreach=False)


def main(out: Path) -> None:
    """Save for each way the bytes at the four moments: of the meter, of all owners together, by owner, and simulated.

    For a way that cannot be simulated it is the error.
    """
    rank = int(os.environ["LOCAL_RANK"])
    distributed.init_process_group("gloo", rank=rank)
    found: dict[str, Any] = {}
    for way in ("ddp", "fsdp"):
        model, steps = build(way)
        batch = torch.randn(128, 8)
        expected = by_hand(model, batch, steps)

        def run(batch: Any, model: Any = model) -> Any:
            return model(batch).sum()

        memory = revlib.memory(run, batch, steps, model=model, advice=False)
        existing = sum(memory.existing.values())
        found[way] = {
            "expected": expected,
            "found": [sum(each.bytes.values()) - existing for each in memory.moments],
            "rows": {name: list(sizes) for name, sizes in memory.rows().items()},
        }
        try:
            fake = revlib.memory(run, batch, steps, model=model, simulate=True)
            found[way]["fake"] = {name: list(sizes) for name, sizes in fake.rows().items()}
        except TypeError as error:
            found[way]["error"] = str(error)
        after = revlib.memory(run, batch, steps, model=model, advice=False)
        found[way]["after"] = {name: list(sizes) for name, sizes in after.rows().items()}
    if rank == 0:
        torch.save(found, out / "result.pt")
    distributed.destroy_process_group()
