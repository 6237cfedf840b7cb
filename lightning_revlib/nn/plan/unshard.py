"""Blocks that FSDP2 has sharded, run by themselves in the middle of the model's forward."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Parameters are whole inside, and FSDP's hooks do no more than in the second run of a checkpointed block.

    They would take a backward inside for the model's, and at its end shard the modules that are in their forward.
    Afterwards FSDP is as it was; what was sharded is sharded again. Without FSDP, nothing is done.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # where nobody has imported it, nothing is sharded
    modules: list[Any] = [m for m in module.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []
    states = {s: (s._training_state, {*s._modules_to_run_forward}) for s in (m._get_fsdp_state() for m in modules)}
    sharded = []
    try:
        for m in modules:
            before = list(m.parameters())
            m.unshard()
            if any(p is not q for p, q in zip(before, m.parameters(), strict=True)):
                sharded.append(m)
        for state, (was, _) in states.items():
            state._training_state = type(was).PRE_BACKWARD
        yield
    finally:
        for state, (was, to_run) in states.items():
            state._training_state = was
            state._modules_to_run_forward.clear()
            state._modules_to_run_forward.update(to_run)
        for m in sharded:
            m.reshard()
