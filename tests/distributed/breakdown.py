"""The bytes of a step by owner in each of two processes, by DDP and by FSDP2: counted, and simulated."""

from __future__ import annotations

import functools
import os
import time
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


class Patient(revlib.MemoryMeter):
    """Sleeps 3 ms after each collective, in which gloo's thread usually lets go of its tensors."""

    def __torch_dispatch__(self, func: Any, *args: Any) -> Any:
        out = super().__torch_dispatch__(func, *args)
        if func.name().startswith("c10d::"):
            time.sleep(0.003)
        return out


def main(out: Path) -> None:
    """Save for each way what `figures` returns."""
    rank = int(os.environ["LOCAL_RANK"])
    distributed.init_process_group("gloo", rank=rank)
    with Patient():
        found = {way: figures(way) for way in ("ddp", "fsdp")}
    if rank == 0:
        torch.save(found, out / "result.pt")
    distributed.destroy_process_group()


def figures(way: str) -> dict[str, Any]:
    """Return the bytes at the four moments, and the weights after some steps with and without a simulation before.

    The bytes are those of the meter, of all owners together, and by owner: counted, simulated, and counted again. They
    are the least of several steps, as gloo may still let go of a tensor late.
    """
    count = functools.partial(revlib.memory, advice=False)
    model, steps = build(way)
    batch = torch.randn(128, 8)

    def run(batch: Any) -> Any:
        return model(batch).sum()

    fresh, fresh_steps = build(way)
    before = count(lambda x: fresh(x).sum(), batch, fresh_steps, model=fresh, simulate=True)
    least_by_hand(fresh, batch, fresh_steps)
    expected = least_by_hand(model, batch, steps)

    def least() -> revlib.Memory:
        found = [count(run, batch, steps, model=model) for _ in range(3)]
        return min(found, key=lambda memory: sum(moment.total for moment in memory.moments))

    with torch.no_grad():
        model(batch)  # after which FSDP2 keeps the weights of the root gathered
    memory, fake, after = least(), count(run, batch, steps, model=model, simulate=True), least()
    existing = sum(memory.existing.values())
    return {
        "expected": expected,
        "found": [sum(each.bytes.values()) - existing for each in memory.moments],
        "before": rows(before),
        "counted": rows(memory),
        "fake": rows(fake),
        "after": rows(after),
        "casts": casts(model, batch),
        "elsewhere": refusal(lambda: count(run, batch, model=model, simulate=True, device="meta"))
        if way == "fsdp"
        else "",
        "advice": advice_after_a_failure(model, batch),
        "weights": [[local(p).tolist() for p in each.parameters()] for each in (model, fresh)],
    }


def casts(model: Any, batch: Any) -> int:
    """Return the highest bytes of weights that autocast has cast."""
    with torch.autocast("cpu", torch.bfloat16):
        memory = revlib.memory(lambda x: model(x).sum(), batch, model=model, simulate=True, advice=False)
    return max(memory.rows().get("casts of weights", [0]))


def refusal(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def advice_after_a_failure(model: Any, batch: Any) -> list[str]:
    """Return the advice if the step fails once, in the midst of a forward with a frozen first layer."""
    failures: list[Any] = []
    first = (model.module if isinstance(model, DistributedDataParallel) else model)[0]

    def fails(*_: Any) -> None:
        if not first.weight.requires_grad and not failures:
            failures.append(first)
            raise RuntimeError("no step")

    with first.register_forward_hook(fails):
        return [each.change for each in revlib.memory(lambda x: model(x).sum(), batch, model=model).advice]


def least_by_hand(*program: Any) -> list[int]:
    return [min(found) for found in zip(*[by_hand(*program) for _ in range(3)], strict=True)]


def rows(memory: Any) -> dict[str, list[int]]:
    return {name: list(sizes) for name, sizes in memory.rows().items()}


def local(parameter: Any) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
