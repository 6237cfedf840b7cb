"""Blocks that FSDP2 has sharded, run by themselves in the middle of the model's forward."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_revlib.nn.internals import fsdp_as_in_backward


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Have whole parameters inside. FSDP's hooks do no more there than in the second run of a checkpointed block.

    They would take a backward inside for the model's, and at its end shard the modules that are in their forward.
    Afterwards FSDP is as it was: what was sharded is sharded again. Without FSDP, nothing is done.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # if nobody has imported it, nothing is sharded
    modules: list[Any] = [m for m in module.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []
    sharded = []
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
