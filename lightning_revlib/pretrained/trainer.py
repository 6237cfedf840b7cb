"""The swap as a callback of transformers' Trainer, and of those made from it, such as TRL's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn
from transformers import TrainerCallback
from typing_extensions import override

from lightning_revlib.nn import swap
from lightning_revlib.nn.convert.swap import Targets, stacks
from lightning_revlib.nn.meter import ActivationMeter
from lightning_revlib.nn.plan.budget import Budget, share_budget
from lightning_revlib.nn.plan.limit import MemoryBudget
from lightning_revlib.pretrained.lazy_logits import chunk_loss


class ReversibleTrainerCallback(TrainerCallback):
    """Swap the model of a Trainer of transformers, and log what its stacks do.

    >>> momentum = {"coupling": {"name": "momentum", "gamma": 0.0625}, "residual": True, "grid_bits": "auto"}
    >>> callback = ReversibleTrainerCallback({"model.layers": momentum}, chunked_loss=True)
    >>> Trainer(model, args, train_dataset=data, callbacks=[callback]).train()

    Each log gets `drift`, the largest of all stacks. After a measured step it gets `activation_held_bytes` and
    `activation_peak_bytes`, counted as by `ActivationMemoryMonitor`. All are in `trainer.state.log_history`, and reach
    the loggers whose callbacks come after this one.

    Args:
        targets: as in `swap`; a glob such as "*.layers" fits a model of PEFT's, too.
        memory_budget: as in `ReversibleStrategy`.
        chunked_loss: compute the loss by chunks, as by `chunk_loss`.
        every_n_steps: measure the bytes of the first step and of each n-th after it; 0 measures none. A measured step
            is two to four times slower.

    Raises:
        TypeError: for targets that are no mapping.
        ValueError: when the Trainer is made, for targets that `swap` refuses, or if its arguments ask for gradient
            checkpointing.
    """

    def __init__(
        self,
        targets: Targets | None = None,
        *,
        memory_budget: MemoryBudget | None = None,
        chunked_loss: bool = False,
        every_n_steps: int = 100,
    ) -> None:
        if targets is not None and not isinstance(targets, Mapping):
            raise TypeError(
                f"targets={targets!r}: pass a mapping, such as {{'model.layers': {{'coupling': 'midpoint'}}}}"
            )
        if not isinstance(every_n_steps, int) or every_n_steps < 0:
            raise ValueError(f"every_n_steps={every_n_steps!r}: pass n to measure each n-th step, or 0 for none")
        self.targets, self.chunked_loss, self.every_n_steps = targets, chunked_loss, every_n_steps
        self.budget = None if memory_budget is None else Budget(memory_budget)
        self._swapped: nn.Module | None = None
        self._measured: dict[str, int] = {}
        self._meter: ActivationMeter | None = None  # while a step is measured
        self._cleanup = ExitStack()

    @override
    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False):
            raise ValueError(
                "gradient_checkpointing=True would run the layers of a reversible list a second time, and they hold"
                " nothing that it could free: pass gradient_checkpointing=False; to checkpoint some layers, take the"
                " option `treatments` of their target"
            )
        if model is None or model is self._swapped:
            return
        if swap(model, self.targets):
            share_budget(stacks(model), self.budget)
        if self.chunked_loss:
            chunk_loss(model)
        self._swapped = model

    on_train_begin = on_init_end  # for a callback that was added to a Trainer later

    @override
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.every_n_steps or state.global_step % self.every_n_steps:
            return
        self._meter = meter = self._cleanup.enter_context(ActivationMeter())
        self._measured = {"activation_held_bytes": 0}
        self._cleanup.callback(model.register_forward_hook(self._after_forward).remove)
        for p in model.parameters():
            if p.requires_grad:
                self._cleanup.callback(p.register_post_accumulate_grad_hook(meter.forget_gradient).remove)

    def _after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        assert self._meter is not None
        self._measured["activation_held_bytes"] = max(self._measured["activation_held_bytes"], self._meter.live)

    @override
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._meter is not None:
            self._measured["activation_peak_bytes"] = self._meter.peak
            self._meter = None
        self._cleanup.close()

    @override
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any) -> None:
        values: dict[str, float] = dict(self._measured) if "loss" in logs else {}
        drifts = [stack.drift for stack in stacks(model).values()]
        if "loss" in logs and (known := [drift for drift in drifts if drift is not None]):
            values["drift"] = max(known)
        logs.update(values)
        state.log_history[-1].update(values)
        self._measured = {} if "loss" in logs else self._measured
