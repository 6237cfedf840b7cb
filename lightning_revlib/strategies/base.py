"""The mixin of Lightning's reversible strategies: swap modules at setup, save and load plans, explain failures."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from typing_extensions import override

from lightning_revlib.nn import restore as restore_stacks
from lightning_revlib.nn.plan.limit import BudgetError
from lightning_revlib.strategies.optimizer_in_backward import OptimizerInBackward
from lightning_revlib.strategies.saved_targets import KEY, save_targets, take_targets
from lightning_revlib.strategies.setup import (
    MemoryBudget,
    Targets,
    TunerBudgetError,
    check_arguments,
    check_flag,
    explain_memory,
    make_budget,
    read_targets,
    save_memory_plan,
    swap_module,
    swap_new,
    take_memory_figures,
)
from lightning_revlib.strategies.sharded_checkpoint import is_sharded, merge_checkpoint, plain_data_only

if TYPE_CHECKING:
    import lightning.pytorch as pl


class ReversibleStrategyMixin(Strategy):
    """Mixin for a strategy of Lightning's: swap the LightningModule's stacks before its hooks are called.

    The module is swapped a second time at setup, for stacks that `setup` or `configure_model` have built. A stack that
    is swapped already stays as it is.

    Args:
        targets: the modules to swap and their options, as in `swap`. Without, the module's attribute
            or method `reversible_targets`; without that, every CoupledSequential.
        optimizer_in_backward: step each parameter as soon as backward has its gradient, and free the
            gradient. Results are the same. See `OptimizerInBackward`.
        memory_budget: the bytes that activations in stacks may take at most, on each device: an int, a
            text such as "2GiB", a float as a fraction of ordinary autograd's peak, or "auto", nine tenths of
            the CUDA device's free memory. Without a budget, as few as possible. Stacks with treatments of their own
            keep them. The first step measures. The plan is printed, and saved in checkpoints with its measurements, so
            that a resumed run follows it from the first step.
        restore: undo the swap when the run ends, also if it fails.
        **kwargs: of Lightning's strategy.

    Raises:
        TypeError: for an unknown argument, or targets that are no mapping.
        ValueError: at setup, if nothing can be swapped or a target is wrong.
    """

    accepting: tuple[Any, ...] = ()  # what takes further arguments, if they are to be checked; Lightning may not

    def __init__(
        self,
        targets: Targets | None = None,
        *,
        memory_budget: MemoryBudget | None = None,
        optimizer_in_backward: bool = False,
        restore: bool = False,
        **kwargs: Any,
    ) -> None:
        if self.accepting:
            check_arguments(type(self), kwargs, ReversibleStrategyMixin, *self.accepting)
        check_flag("optimizer_in_backward", optimizer_in_backward)
        check_flag("restore", restore)
        super().__init__(**kwargs)
        self.targets = read_targets(targets)
        self.budget = make_budget(memory_budget)
        self.restore = restore
        self.optimizer_in_backward = OptimizerInBackward() if optimizer_in_backward else None

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        assert self.lightning_module is not None
        swap_module(self.lightning_module, self.targets, self.budget, strict=False)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        swap_module(self.lightning_module, self.targets, self.budget)
        super().setup(trainer)
        if self.optimizer_in_backward is not None and trainer.training:
            self.optimizer_in_backward.attach(trainer)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._swap_new()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx == 0:  # of each epoch
            self._swap_new()

    def _swap_new(self) -> None:
        """Swap what hooks have assigned since `setup`."""
        assert self.lightning_module is not None
        swap_new(self.lightning_module, self.targets, self.budget)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer_in_backward is not None:
            self.optimizer_in_backward.register_hooks()
        try:
            return super().training_step(*args, **kwargs)
        except BudgetError as error:
            module: Any = self.lightning_module
            if module.trainer.callbacks:  # none while Lightning's Tuner tries a batch size
                raise
            raise TunerBudgetError(str(error)) from error

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.lightning_module is not None:
            save_memory_plan(checkpoint, self.budget, self.lightning_module)
            save_targets(checkpoint, self.lightning_module)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint of any strategy; execute nothing in it unless `weights_only=False` allows it."""
        checkpoint = self._read_checkpoint(checkpoint_path, weights_only is not False)
        if self.lightning_module is not None:
            saved = checkpoint.pop(KEY, {})
            trainer: Any = self.lightning_module.trainer
            if not (trainer.training and any(hasattr(c, "sets_couplings") for c in trainer.callbacks)):
                take_targets(self.lightning_module, saved, self.targets, self.budget)
            take_memory_figures(self.lightning_module, checkpoint.get("memory_figures", {}))
        return checkpoint

    def _read_checkpoint(self, checkpoint_path: Any, weights_only: bool) -> dict[str, Any]:
        if not is_sharded(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        if not isinstance(self, ModelParallelStrategy):
            return merge_checkpoint(checkpoint_path, weights_only=weights_only)
        with plain_data_only(checkpoint_path) if weights_only else nullcontext():
            return super().load_checkpoint(checkpoint_path, weights_only=weights_only)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self.lightning_module is not None:
            explain_memory(exception, self.lightning_module)

    @override
    def teardown(self) -> None:
        if self.optimizer_in_backward is not None:
            self.optimizer_in_backward.detach()
        super().teardown()
        if self.restore and self.lightning_module is not None:
            restore_stacks(self.lightning_module)
