"""`Trainer(strategy="reversible_fsdp")`: reversible stacks, with parameters sharded over all processes by FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from typing_extensions import override

from lightning_revlib.nn import CoupledSequential, ReversibleSequential
from lightning_revlib.nn.convert.swap import stacks
from lightning_revlib.strategies.base import ReversibleStrategyMixin
from lightning_revlib.strategies.setup import MemoryBudget, Targets, refuse_overlap, swap_module

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy

STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class ReversibleFSDPStrategy(ReversibleStrategyMixin, ModelParallelStrategy):
    """Shard the model over all processes by FSDP2, and run its stacks reversibly.

    >>> Trainer(strategy="reversible_fsdp", devices=8)
    >>> Trainer(strategy=ReversibleFSDPStrategy(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))

    A LightningModule needs no code of its own: each block of each stack is sharded by itself, and the rest
    of the module at its root. A module whose `configure_model` has called `fully_shard` is left as it is;
    stacks that it builds there have to be swapped first, by `revlib.swap(self)`.

    Backward gathers parameters as it always does, and recomputation adds no communication.
    Checkpoints are folders of shards unless `save_distributed_checkpoint=False`. A run can resume from both
    kinds, and from those of other strategies. After a run the module's parameters stay sharded.

    Args:
        targets, memory_budget, optimizer_in_backward, restore: see `ReversibleStrategyMixin`.
        mp_policy, offload_policy, reshard_after_forward: as in `fully_shard`, for all blocks and the root.
        data_parallel_size: default all processes.
        tensor_parallel_size: default 1; with more, the module parallelizes its tensors in `configure_model`.
        save_distributed_checkpoint, process_group_backend, timeout: as in `ModelParallelStrategy`.

    Raises:
        ValueError: at setup, if nothing can be swapped, or a stack was sharded before it was swapped.

    Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """

    strategy_name = "reversible_fsdp"

    def __init__(
        self,
        targets: Targets | None = None,
        *,
        memory_budget: MemoryBudget | None = None,
        optimizer_in_backward: bool = False,
        restore: bool = False,
        mp_policy: MixedPrecisionPolicy | None = None,
        offload_policy: OffloadPolicy | None = None,
        reshard_after_forward: bool | int | None = None,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        super().__init__(
            targets,
            memory_budget=memory_budget,
            optimizer_in_backward=optimizer_in_backward,
            restore=restore,
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            **({} if timeout is None else {"timeout": timeout}),
        )
        self.policies = {
            "mp_policy": mp_policy, "offload_policy": offload_policy, "reshard_after_forward": reshard_after_forward,
        }  # fmt: skip

    @override
    def setup_environment(self) -> None:
        if self._data_parallel_size == "auto":
            assert isinstance(self._tensor_parallel_size, int)
            self._data_parallel_size = self.num_nodes * self.num_processes // self._tensor_parallel_size
        super().setup_environment()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        _check_order(module)
        swap_module(module, self.targets, self.budget)
        if not any(isinstance(m, FSDPModule) for m in module.modules()):
            self.precision_plugin.convert_module(module)
            shard(module, self.device_mesh["data_parallel"], **self.policies)
        with _configured(module):
            super().setup(trainer)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        try:
            return super().load_checkpoint(checkpoint_path, weights_only)
        except IndexError:  # Lightning reads the first state of each optimizer, and SGD has none: load without them
            optimizers, self._optimizers = self._optimizers, []
        try:
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        finally:
            self._optimizers = optimizers
        for optimizer, state in zip(optimizers, checkpoint["optimizer_states"], strict=True):
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group.update({name: value for name, value in saved.items() if name != "params"})
        return checkpoint


def shard(module: nn.Module, mesh: DeviceMesh, **policies: Any) -> None:
    """Shard each block of each stack by itself, inner stacks first, and the rest of the module at its root.

    A policy of None is left to `fully_shard`.
    """
    refuse_overlap(module, "FSDP")
    policies = {name: policy for name, policy in policies.items() if policy is not None}
    for stack in reversed(stacks(module).values()):
        for block in stack:
            if not isinstance(block, FSDPModule) and any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh, **policies)
                if hasattr(type(block), "inverse"):
                    register_fsdp_forward_method(block, "inverse")
    fully_shard(module, mesh=mesh, **policies)
    for name in [*STEPS, "inverse"]:
        if hasattr(module, name) and (name not in STEPS or is_overridden(name, module, pl.LightningModule)):
            register_fsdp_forward_method(module, name)


def _check_order(module: nn.Module) -> None:
    """Raise ValueError if a stack was sharded before it was swapped, since `fully_shard` has changed its class."""
    for path, m in module.named_modules():
        if isinstance(m, FSDPModule) and isinstance(m, CoupledSequential) and not isinstance(m, ReversibleSequential):
            raise ValueError(
                f"{path} was sharded before it was swapped; in configure_model, call revlib.swap(self) first"
            )


@contextmanager
def _configured(module: pl.LightningModule) -> Iterator[None]:
    """Give the module a `configure_model` while active, since ModelParallelStrategy refuses a module without one."""
    if is_overridden("configure_model", module):
        yield
        return
    object.__setattr__(module, "configure_model", lambda: None)
    try:
        yield
    finally:
        object.__delattr__(module, "configure_model")
