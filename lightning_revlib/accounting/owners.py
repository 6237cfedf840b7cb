"""Owners of bytes, and what a table calls them."""

from __future__ import annotations

from typing import NamedTuple

PARAMETERS, GRADIENTS, STATE, BUFFERS, BATCH = "parameters", "gradients", "optimizer state", "buffers", "batch"
CASTS, GATHERED, STREAMS, HELD, NEEDED = (
    "casts of weights",
    "gathered weights",
    "inputs and outputs",
    "held by blocks",
    "needed in backward by blocks",
)
MODULE, LOSS, OPTIMIZER, REST = "outside of stacks", "logits and loss", "step of the optimizer", "the rest"
KINDS = (
    PARAMETERS, GRADIENTS, STATE, BUFFERS, BATCH, CASTS, GATHERED, STREAMS, HELD, NEEDED, MODULE, LOSS, OPTIMIZER, REST
)  # fmt: skip


class Owner(NamedTuple):
    """An owner of bytes: its kind, and the path of a stack, of a stack's block, or of a module outside; else ""."""

    kind: str
    path: str = ""

    def __str__(self) -> str:
        if self.kind == MODULE:
            return self.path or "the model itself"
        if self.kind == STREAMS:
            return f"{self.path or 'the model'}, {self.kind}"
        if self.kind in (HELD, NEEDED):
            return f"{self.path}, {self.kind.removesuffix(' by blocks')}"
        return self.kind

    @property
    def rank(self) -> tuple[int, str]:
        """By which a table is sorted."""
        return KINDS.index(self.kind), self.path
