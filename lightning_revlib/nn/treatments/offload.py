"""Treatment "offload": what blocks save waits for backward in pinned memory of the host; see `transfer`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.base import StepCost, Treatment
from lightning_revlib.nn.treatments.forward import Forward
from lightning_revlib.nn.treatments.streams import has_streams
from lightning_revlib.nn.treatments.transfer import OffloadedStep, Transfer

FLOPS_PER_CARRIED_BYTE = 8_000  # FLOPs that a GPU does while a byte is copied to the host or back


class Offload(Treatment):
    """Keep everything that the block saves in the host's memory, on devices with streams."""

    def __init__(self, forward: Forward, a: Tensor, b: Tensor) -> None:
        super().__init__(forward, a, b)
        self.transfer = Transfer(a.device)
        self.last: OffloadedStep | None = None

    @classmethod
    def is_possible(cls, step: Step, device: torch.device) -> bool:
        return super().is_possible(step, device) and has_streams(device)

    @classmethod
    def is_offered(cls, options: Any) -> bool:
        return bool(options.offload)

    def step(self, step: Step, a: Tensor, b: Tensor) -> Streams:
        self.last = OffloadedStep(self.transfer, step.module, self.last)
        return self.last.run(step, a, b, self.forward.compiler)

    def close(self, a: Tensor, b: Tensor) -> None:
        if self.last is not None:
            self.last.end()

    def close_joined(self, y: Tensor, halve: Any) -> None:
        self.close(y, y)

    @classmethod
    def cost(cls, alone: StepCost, stored: StepCost) -> StepCost:
        """Add what the steps beside it have on their way, and the time of copies."""
        moved = stored.held - alone.held
        work = max(stored.work, 2 * moved * FLOPS_PER_CARRIED_BYTE)
        return StepCost(alone.held, alone.forward + moved, alone.backward + moved, work, alone.kept)
