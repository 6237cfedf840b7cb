"""Treatment "store": ordinary autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.base import Treatment


class Store(Treatment):
    """Keep everything that the block saves."""

    @classmethod
    def is_possible(cls, step: Step, device: torch.device) -> bool:
        return True

    def step(self, step: Step, a: Tensor, b: Tensor) -> Streams:
        return step.run(a, b, self.forward.compiler)
