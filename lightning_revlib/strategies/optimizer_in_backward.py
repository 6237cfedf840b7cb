"""The optimizer in backward: each parameter is stepped as its gradient arrives, and the gradient freed.

backward:  for each parameter, as soon as its gradient is complete:  p <- step(p, g);  g <- nothing
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    import lightning.pytorch as pl


class InBackward:
    """Hooks that run the run's one optimizer parameter by parameter while backward is still going on.

    The optimizer is the one that `configure_optimizers` returned, restricted for the moment to one
    parameter, so that its state, its schedulers and its checkpoints are as ever, and the step that
    Lightning calls after backward finds no gradient left. Reversible stacks allow it: a block's
    parameters get their gradients when the block has been run for the last time.

    `on_before_optimizer_step`, `on_after_backward` and metrics of gradients come too late to see any, and an
    `optimizer_step` of the module's own decides nothing but learning rates: a warning says so. Clipping by
    value is done parameter by parameter.

    Source: https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html

    Raises:
        ValueError: at setup, with what needs all gradients at a time, or some of them twice.
    """

    def __init__(self) -> None:
        self._hooks: dict[Tensor, Any] = {}
        self.clip: float | None = None
        self._trainer: pl.Trainer | None = None  # while it has lent us its clipping

    def attach(self, trainer: pl.Trainer) -> None:
        """Take over from the Trainer, which must have been set up."""
        self.detach()
        if why := _obstacle(trainer):
            raise ValueError(f"optimizer_in_backward=True does not go with {why}")
        if late := _late(trainer.lightning_module):
            hook = f"{type(trainer.lightning_module).__name__}.{late[0]}"
            warnings.warn(
                f"optimizer_in_backward=True: when {hook} runs, parameters have been stepped and their gradients freed;"
                " changing gradients there, or not stepping, has no effect",
                stacklevel=2,
            )
        self._trainer, self.clip = trainer, trainer.gradient_clip_val
        trainer.gradient_clip_val = None
        self.hook()

    def hook(self) -> None:
        """Hook the parameters of the optimizer that have none yet, such as what has been unfrozen."""
        assert self._trainer is not None
        (optimizer,) = self._trainer.strategy.optimizers
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.requires_grad and p not in self._hooks:
                    self._hooks[p] = p.register_post_accumulate_grad_hook(_Step(self, optimizer, group))

    def detach(self) -> None:
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        if self._trainer is not None:
            self._trainer.gradient_clip_val, self._trainer = self.clip, None


class _Step:
    """The hook of one parameter."""

    def __init__(self, owner: InBackward, optimizer: Optimizer, group: dict[str, Any]) -> None:
        self.owner, self.optimizer, self.group = owner, optimizer, group

    def __call__(self, parameter: Tensor) -> None:
        if self.owner.clip:
            torch.nn.utils.clip_grad_value_([parameter], self.owner.clip)
        optimizer, group = self.optimizer, self.group
        groups, parameters, before = optimizer.param_groups, group["params"], dict(group)
        group["params"] = [parameter]
        optimizer.param_groups = [group]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
            group["params"] = parameters
        parameter.grad = None
        changed = [name for name in group if name != "params" and group[name] is not before.get(name)]
        if changed:
            raise ValueError(
                f"optimizer_in_backward=True: {type(optimizer).__name__} counts in {', '.join(changed)} for a whole"
                " group of parameters; take an optimizer that counts for each parameter, such as those of torch.optim"
            )


def _late(module: pl.LightningModule) -> list[str]:
    """The hooks of the module that find neither gradients nor a step to make."""
    from lightning.pytorch.utilities.model_helpers import is_overridden

    hooks = ("on_after_backward", "on_before_optimizer_step", "optimizer_step")
    return [name for name in hooks if is_overridden(name, module)]


def _obstacle(trainer: pl.Trainer) -> str | None:
    """What the optimizer in backward cannot be combined with, and the way out; None if there is nothing."""
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
    from lightning.pytorch.utilities.model_helpers import is_overridden

    module, strategy = trainer.lightning_module, trainer.strategy
    if not module.automatic_optimization:
        return "manual optimization, where you say when to step; call the optimizer there"
    if len(strategy.optimizers) != 1 or isinstance(strategy.optimizers[0], torch.optim.LBFGS):
        names = ", ".join(type(optimizer).__name__ for optimizer in strategy.optimizers) or "no optimizer"
        return f"{names}: it takes one optimizer, and one that needs no closure"
    if trainer.accumulate_grad_batches != 1:
        return (
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}: accumulated gradients are what it frees;"
            " take smaller batches instead"
        )
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return "GradientAccumulationScheduler: accumulated gradients are what it frees"
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
        return (
            f"gradient_clip_val={trainer.gradient_clip_val} by norm, which is that of all gradients together; clip by"
            " value (gradient_clip_algorithm='value'), or not at all"
        )
    if is_overridden("configure_gradient_clipping", module):
        return f"{type(module).__name__}.configure_gradient_clipping, which would find no gradients; remove it"
    if getattr(strategy.precision_plugin, "scaler", None) is not None:
        return "precision='16-mixed', whose GradScaler looks at all gradients before it steps; take 'bf16-mixed'"
    if isinstance(strategy, DDPStrategy | DeepSpeedStrategy):
        return (
            f"{type(strategy).__name__} on {trainer.world_size} processes, which averages gradients in buckets after"
            " they have arrived; take strategy='reversible_fsdp'"
        )
    return None
