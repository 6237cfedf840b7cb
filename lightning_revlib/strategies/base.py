"""What all reversible strategies add to Lightning's own: the swap at the right moments, and what goes with it."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_revlib.nn.convert.swap import Targets, find, restore, stacks, swap
from lightning_revlib.nn.plan.budget import Budget, share_budget
from lightning_revlib.nn.stacks.options import MemoryBudget
from lightning_revlib.strategies.optimizer_in_backward import InBackward
from lightning_revlib.strategies.sharded_checkpoint import is_sharded, merge_checkpoint, plain_data_only

if TYPE_CHECKING:
    import lightning.pytorch as pl


class Swapping(Strategy):
    """Mixin for a strategy: the LightningModule's stacks are swapped before hooks see it.

    They are swapped again, which does no harm, when `setup` and `configure_model` have built the rest.

    Args:
        targets: which modules, and with which options, as in `swap`. Without, the module's attribute
            or method `reversible_targets`; without that, every CoupledSequential.
        optimizer_in_backward: step each parameter as soon as backward has its gradient, and free the
            gradient: the same results, and gradients of one parameter at a time. See `InBackward`.
        memory_budget: the bytes that activations in stacks may take at most, on each device: an int, a
            text such as "2GiB", a fraction of what ordinary autograd takes, or "auto", what is free on
            the CUDA device. Without, as few as possible. Stacks that choose treatments themselves keep
            them. The first step measures; the plan is printed, and saved in checkpoints, with what a run
            that resumes needs to follow it at once.
        restore: undo the swap when the run ends, however it ends.
        **kwargs: of Lightning's strategy.

    Raises:
        TypeError: for an unknown argument, or targets that are no mapping.
        ValueError: at setup, if nothing can be swapped or a target is wrong.
    """

    def __init__(
        self,
        targets: Targets | None = None,
        *,
        memory_budget: MemoryBudget | None = None,
        optimizer_in_backward: bool = False,
        restore: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.targets = read_targets(targets)
        self.budget = make_budget(memory_budget)
        self.restore = restore
        self.in_backward = InBackward() if optimizer_in_backward else None

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        """The names are in `names.py`; inherited, this would register Lightning's."""

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
        if self.in_backward is not None and trainer.training:
            self.in_backward.attach(trainer)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.in_backward is not None:
            self.in_backward.hook()
        return super().training_step(*args, **kwargs)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.lightning_module is not None:
            save_memory_plan(checkpoint, self.budget, self.lightning_module)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """As Lightning's, but of every strategy's kind, and executing nothing unless `weights_only=False` allows it."""
        checkpoint = self._load(checkpoint_path, weights_only is not False)
        if self.lightning_module is not None:
            take_memory_figures(self.lightning_module, checkpoint.get("memory_figures", {}))
        return checkpoint

    def _load(self, checkpoint_path: Any, safe: bool) -> dict[str, Any]:
        if not is_sharded(checkpoint_path):
            return super().load_checkpoint(checkpoint_path, weights_only=safe)
        if not isinstance(self, ModelParallelStrategy):
            return merge_checkpoint(checkpoint_path, weights_only=safe)
        with plain_data_only(checkpoint_path) if safe else nullcontext():
            return super().load_checkpoint(checkpoint_path, weights_only=safe)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        if self.lightning_module is not None:
            explain_memory(exception, self.lightning_module)

    @override
    def teardown(self) -> None:
        if self.in_backward is not None:
            self.in_backward.detach()
        super().teardown()
        if self.restore and self.lightning_module is not None:
            restore(self.lightning_module)


def swap_module(
    module: nn.Module, targets: Targets | None, budget: Budget | None = None, *, strict: bool = True
) -> list[str]:
    """`swap` with the targets given, or else those that the module names itself, and the budget for all its stacks."""
    if targets is None:
        targets = getattr(module, "reversible_targets", None)
        targets = read_targets(targets() if callable(targets) else targets)
    if not strict and not find(module, targets, strict=False):
        return []
    paths = swap(module, targets, strict=strict)
    share_budget(stacks(module), budget)
    return paths


def refuse_overlap(module: nn.Module, name: str) -> None:
    """Raise where a stack undoes steps on a stream of their own, for which parameters are not gathered."""
    for path, stack in stacks(module).items():
        if stack.overlap:
            raise ValueError(
                f"{path}: overlap=True runs a block on a stream of its own, {name} gathers its parameters in others;"
                " leave it out, or take strategy='reversible', which keeps them in place"
            )


def make_budget(memory_budget: MemoryBudget | None) -> Budget | None:
    return None if memory_budget is None else Budget(memory_budget, announce=rank_zero_info)


def save_memory_plan(checkpoint: dict[str, Any], budget: Budget | None, module: nn.Module) -> None:
    """Put into a checkpoint the budget's plan, to read, and what the plans of all stacks follow from, by path."""
    if budget is not None and budget.plan is not None:
        checkpoint["memory_plan"] = asdict(budget.plan)
    figures: dict[str, Any] = {}
    for stack in stacks(module).values():
        if stack.budget is not None:
            figures.update(stack.budget.state_dict())
    if figures:
        checkpoint["memory_figures"] = figures


def take_memory_figures(module: nn.Module, figures: Mapping[str, Any]) -> None:
    """Let a run that resumes follow the plans of before from its first step; those of stacks without a budget go."""
    for path, stack in stacks(module).items():
        if stack.budget is not None and path in figures:
            stack.budget.load_state_dict({path: figures[path]})


def read_targets(targets: Any) -> Targets | None:
    """Targets as `swap` takes them; those of Hydra become plain, so that they can be pickled and compared."""
    if (omegaconf := sys.modules.get("omegaconf")) is not None and omegaconf.OmegaConf.is_config(targets):
        targets = omegaconf.OmegaConf.to_container(targets, resolve=True)
    if targets is not None and not isinstance(targets, Mapping):
        raise TypeError(
            f"targets={targets!r}: pass a mapping from the path of a module to its options, such as"
            " {'net.blocks': {'coupling': 'additive'}}"
        )
    return targets


def check_arguments(owner: type, given: Mapping[str, Any], *takers: Any) -> None:
    """Raise TypeError for an argument that none of the takers has: they would say so too late, or never."""
    known = {name for taker in takers for name in inspect.signature(taker).parameters} - {"self", "kwargs", "module"}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}"
            raise TypeError(f"{owner.__name__} has no argument {name}={given[name]!r}; {hint}")


def explain_memory(exception: BaseException, module: nn.Module) -> None:
    """Add to an error of exhausted memory what can still be changed."""
    if not isinstance(exception, torch.OutOfMemoryError) and not any(
        words in str(exception) for words in ("not enough memory", "can't allocate memory")
    ):
        return
    ways = []
    for path, stack in stacks(module).items():
        if stack.plan is None or stack.path not in stack.plan.treatments:  # it may not have run yet
            treatments, units = stack.treatments, "blocks"
            way = "give them a smaller memory_budget or store_last, or treatments of 'reversible'"
        else:
            treatments, units = stack.plan.treatments[stack.path], "steps"
            way = "by their memory plan; take a smaller memory_budget"
        if kept := len(treatments) - treatments.count("reversible"):
            ways.append(f"{path}: {kept} of {len(treatments)} {units} keep activations: {way}")
    advice = "; ".join(ways) or (
        "all stacks hold their output only; a smaller batch or a shorter stack outside of them,"
        " accumulate_grad_batches or optimizer_in_backward=True remain"
    )
    text = f"{exception}\nreversible stacks: {advice}; revlib.report(model, batch) measures it"
    exception.args = (text, *exception.args[1:])
