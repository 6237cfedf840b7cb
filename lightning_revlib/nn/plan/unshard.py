"""Running blocks that FSDP2 has sharded by themselves, in the middle of the model's forward."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_revlib.nn.internals import fsdp_as_in_backward


def fsdp_modules(module: nn.Module) -> list[Any]:
    """Return the modules in it that `fully_shard` has sharded."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if nobody has imported it, nothing is sharded
    return [m for m in module.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gather the parameters of a module's FSDP units inside, and shard at the end those that were sharded before.

    FSDP's hooks act inside as they do in the second run of a checkpointed block. Otherwise they would take a backward
    inside for the model's, and at its end shard modules that are still in their forward.
    """
    modules, sharded = fsdp_modules(module), []
    try:
        for m in modules:
            before = list(m.parameters())
            m.unshard()
            if any(p is not q for p, q in zip(before, m.parameters(), strict=True)):
                sharded.append(m)
        with fsdp_as_in_backward(modules):
            yield
    finally:
        for m in sharded:
            m.reshard()
