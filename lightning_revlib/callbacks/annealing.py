"""A callback that moves a pretrained network to its coupling step by step: gamma_t = gamma min(1, t / steps)."""

from __future__ import annotations

import dataclasses
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_revlib.nn import Momentum, Scaled
from lightning_revlib.nn.convert.swap import stacks
from lightning_revlib.nn.engine.drift import expected_drift

ANNEALED: dict[type, str] = {Momentum: "gamma", Scaled: "scale"}


class CouplingAnnealing(Callback):
    """Begin with the pretrained function, and change it to that of the stacks' coupling within `steps` steps.

    >>> Trainer(
    ...     strategy=ReversibleStrategy(targets={"model.encoder.layer": {
    ...         "coupling": {"name": "momentum", "gamma": 0.5}, "residual": True}}),
    ...     callbacks=[CouplingAnnealing(steps=1000)],
    ... )

    Momentum's gamma, or scaled's scale, grows from 0 to the stack's own value. At 0 the swapped network
    computes the same function as before the swap. While the value is so small that the inverse would drift
    by more than `tolerance`, activations are stored; memory is saved only after that. The value depends on the number
    of the step alone, so that a run can be resumed.

    Args:
        steps: optimizer steps until the stacks' own coupling is reached.
        tolerance: relative drift up to which backward inverts blocks; see `report` for the drift to expect.

    Raises:
        ValueError: for fewer than one step; when training starts, if no stack has momentum or scaled, or a stack
            with one of these couplings has a memory budget.
    """

    sets_couplings = True  # in training; a strategy that resumes leaves it to this callback

    def __init__(self, steps: int, tolerance: float = 1e-3) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r}: take at least one step until the stacks' own coupling is reached")
        self.steps, self.tolerance = steps, tolerance
        # all by path
        self._own: dict[str, Any] = {}  # the stacks' own couplings and treatments
        self._set: dict[str, Any] = {}  # couplings as this callback set them last
        self._stacks: dict[str, Any] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = stacks(pl_module)
        self._stacks = {
            path: stack
            for path, stack in found.items()
            if stack.grid_bits is None and any(type(c) in ANNEALED for c in stack.couplings)
        }
        if not self._stacks:
            couplings = ", ".join(f"{path}: {c}" for path, stack in found.items() for c in stack.couplings)
            raise ValueError(
                "CouplingAnnealing is for momentum and scaled without grid_bits, and the stacks have"
                f" {couplings or 'none'}"
            )
        for path, stack in self._stacks.items():
            if stack.budget is not None:
                raise ValueError(
                    f"memory_budget={stack.budget.value!r} of {path or 'the model'}: its plan is made in the first"
                    " step, when CouplingAnnealing has no coupling yet that can be inverted; leave out memory_budget,"
                    " or CouplingAnnealing"
                )
            if self._set.get(path) != stack.couplings:  # if equal, an interrupted run continues
                self._own[path] = stack.couplings, stack.treatments

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        progress = min(1.0, trainer.global_step / self.steps)
        for path, stack in self._stacks.items():
            couplings, treatments = self._own[path]
            stack.couplings = self._set[path] = tuple(_scale(coupling, progress) for coupling in couplings)
            dtype = stack.stream_dtype or torch.float32
            drift = max(expected_drift(c, stack.step_count, dtype) for c in stack.couplings)
            stack.treatments = treatments if drift < self.tolerance else tuple("store" for _ in treatments)
        pl_module.log("annealing", progress, on_step=True, on_epoch=False)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stacks = {}


def _scale(coupling: Any, progress: float) -> Any:
    """Return the coupling with its annealed value multiplied by `progress`; another coupling as it is."""
    name = ANNEALED.get(type(coupling))
    return coupling if name is None else dataclasses.replace(coupling, **{name: getattr(coupling, name) * progress})
