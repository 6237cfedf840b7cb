"""The optimizer in backward: step each parameter as soon as its gradient is complete, and free the gradient.

backward:  for each parameter p, as soon as its gradient g is complete:  p <- step(p, g);  g <- None
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    import lightning.pytorch as pl


class OptimizerInBackward:
    """Step the run's one optimizer during backward, parameter by parameter, by hooks on the parameters.

    The optimizer is the one that `configure_optimizers` returned. During a parameter's step it is
    restricted to that parameter, so that its state, its schedulers and its checkpoints stay as they are without
    this class. The step that Lightning calls after backward finds no gradient. Reversible stacks allow
    this, since a block's parameters get their gradients when backward has run the block for the last time.

    `on_before_optimizer_step`, `on_after_backward` and metrics of gradients run too late to see any, and an
    `optimizer_step` of the module's own can only set learning rates; a warning says so. Clipping by
    value is done parameter by parameter.

    Source: https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html

    Raises:
        ValueError: at setup, if something needs all gradients at once, or a gradient twice.
    """

    def __init__(self) -> None:
        self._hooks: dict[Tensor, Any] = {}
        self._clip: float | None = None
        self._trainer: pl.Trainer | None = None  # while attached

    def attach(self, trainer: pl.Trainer) -> None:
        """Take over stepping and clipping from the Trainer, which must have been set up."""
        self.detach()
        if conflict := _find_conflict(trainer):
            raise ValueError(f"optimizer_in_backward=True does not go with {conflict}")
        if late := _find_late_hooks(trainer.lightning_module):
            hook = f"{type(trainer.lightning_module).__name__}.{late[0]}"
            warnings.warn(
                f"optimizer_in_backward=True: when {hook} runs, parameters have been stepped and their gradients freed;"
                " changing gradients there, or not stepping, has no effect",
                stacklevel=2,
            )
        self._trainer, self._clip = trainer, trainer.gradient_clip_val
        trainer.gradient_clip_val = None  # until `detach`
        self.register_hooks()

    def register_hooks(self) -> None:
        """Add a hook to each of the optimizer's parameters that has none yet, such as one that was unfrozen."""
        assert self._trainer is not None
        (optimizer,) = self._trainer.strategy.optimizers
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if p.requires_grad and p not in self._hooks:
                    step = ParameterStep(optimizer, index, self._clip)
                    self._hooks[p] = p.register_post_accumulate_grad_hook(step)

    def detach(self) -> None:
        """Remove all hooks, and give clipping back to the Trainer."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        if self._trainer is not None:
            self._trainer.gradient_clip_val, self._trainer = self._clip, None


class ParameterStep:
    """Hook of one parameter: clip its gradient, step the optimizer for it alone, and free the gradient.

    The parameter's group is known by its index, as `optimizer.load_state_dict` makes other groups.
    """

    def __init__(self, optimizer: Optimizer, index: int, clip: float | None) -> None:
        self.optimizer, self.index, self.clip = optimizer, index, clip

    def __call__(self, parameter: Tensor) -> None:
        if self.clip:
            torch.nn.utils.clip_grad_value_([parameter], self.clip)
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        group = groups[self.index]
        parameters, before = group["params"], dict(group)
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


def _find_late_hooks(module: pl.LightningModule) -> list[str]:
    """Return the module's hooks that would run after the steps, when gradients have been freed."""
    from lightning.pytorch.utilities.model_helpers import is_overridden

    hooks = ("on_after_backward", "on_before_optimizer_step", "optimizer_step")
    return [name for name in hooks if is_overridden(name, module)]


def _find_conflict(trainer: pl.Trainer) -> str | None:
    """Return a setting that the optimizer in backward excludes, and the way out, or None if there is no conflict."""
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
    from lightning.pytorch.utilities.model_helpers import is_overridden

    module, strategy = trainer.lightning_module, trainer.strategy
    if not module.automatic_optimization:
        return "manual optimization, in which the module steps its optimizers itself; step them there"
    if len(strategy.optimizers) != 1 or isinstance(strategy.optimizers[0], torch.optim.LBFGS):
        names = ", ".join(type(optimizer).__name__ for optimizer in strategy.optimizers) or "no optimizer"
        return f"{names}: it takes one optimizer, and one that needs no closure"
    if trainer.accumulate_grad_batches != 1:
        return (
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}, since it frees gradients instead of"
            " accumulating them; take smaller batches instead"
        )
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return "GradientAccumulationScheduler, since it frees gradients instead of accumulating them; remove it"
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm != "value":
        return (
            f"gradient_clip_val={trainer.gradient_clip_val} by norm, which takes all gradients at once; clip by"
            " value (gradient_clip_algorithm='value'), or not at all"
        )
    if is_overridden("configure_gradient_clipping", module):
        return f"{type(module).__name__}.configure_gradient_clipping, which would find no gradients; remove it"
    if getattr(strategy.precision_plugin, "scaler", None) is not None:
        return "precision='16-mixed', whose GradScaler looks at all gradients before it steps; take 'bf16-mixed'"
    if isinstance(strategy, DDPStrategy | DeepSpeedStrategy):
        return (
            f"{type(strategy).__name__} on {trainer.world_size} processes, which averages gradients in buckets, after"
            " backward has passed them; take strategy='reversible_fsdp'"
        )
    return None
