"""Reversible stacks under Lightning Fabric: `Fabric(strategy="reversible")` and "reversible_fsdp".

Fabric has strategies of its own. Those of this module swap the modules that are given to `fabric.setup`, in place. They
do not touch parameters, so that an optimizer that was built before stays valid.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_revlib.strategies.ddp import StartMethod
from lightning_revlib.strategies.deferred import DeferredStrategy
from lightning_revlib.strategies.fsdp import shard
from lightning_revlib.strategies.setup import (
    MemoryBudget,
    Targets,
    check_arguments,
    make_budget,
    read_targets,
    swap_module,
)

if TYPE_CHECKING:
    from lightning.fabric.accelerators import Accelerator
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, Precision
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy


class ReversibleFabricMixin(Strategy):
    """Mixin for a strategy of Fabric's: swap each module when it is set up.

    A module without stacks is left as it is. If no module has any, the first step of an optimizer raises a ValueError.

    Args:
        targets: as in `swap`. Without, the module's `reversible_targets`, or every CoupledSequential.
        memory_budget: as in `ReversibleStrategyMixin`, for each module that is set up.
        **kwargs: of Fabric's strategy.
    """

    def __init__(
        self, targets: Targets | None = None, *, memory_budget: MemoryBudget | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.targets, self.memory_budget = read_targets(targets), memory_budget
        make_budget(memory_budget)  # raises for an invalid one; each module gets its own
        self.swapped: list[str] = []

    @override
    def setup_module(self, module: nn.Module) -> Any:
        self.swapped += swap_module(module, self.targets, make_budget(self.memory_budget), strict=False)
        return super().setup_module(module)

    @override
    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        if not self.swapped:  # not in `backward`: with one of its own, Fabric would refuse loss.backward()
            raise ValueError(
                "nothing to swap: no module that was set up has a CoupledSequential or a match of"
                f" targets={self.targets!r}; build stacks from CoupledSequential, or name containers by targets:"
                " print(lightning_revlib.report(model, batch)) proposes them"
            )
        return super().optimizer_step(optimizer, **kwargs)


class ReversibleFabricDDPStrategy(ReversibleFabricMixin, DDPStrategy):
    """Fabric's DDPStrategy with reversible stacks. `ReversibleFabricStrategy` becomes one on several devices."""


class ReversibleFabricStrategy(ReversibleFabricMixin, DeferredStrategy, SingleDeviceStrategy):
    """`ReversibleStrategy` for Fabric: one device, or several by DDP.

    >>> fabric = Fabric(strategy="reversible", devices=2)
    >>> fabric.launch()
    >>> model, optimizer = fabric.setup(model, optimizer)

    Arguments and errors are those of `ReversibleStrategy`; Fabric has no `restore` and no `optimizer_in_backward`.
    """

    distributed_class = ReversibleFabricDDPStrategy

    def __init__(
        self,
        targets: Targets | None = None,
        *,
        memory_budget: MemoryBudget | None = None,
        start_method: StartMethod | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(type(self), kwargs, ReversibleFabricStrategy, DDPStrategy, DistributedDataParallel)
        own: dict[str, Any] = {"targets": targets, "memory_budget": memory_budget}
        super().__init__(**own, accelerator=accelerator, checkpoint_io=checkpoint_io, precision=precision)
        launch = {"start_method": start_method, "process_group_backend": process_group_backend, "timeout": timeout}
        self.defer(parallel_devices, cluster_environment, {**own, **launch, **kwargs})


class ReversibleFabricFSDPStrategy(ReversibleFabricMixin, ModelParallelStrategy):
    """`ReversibleFSDPStrategy` for Fabric: each block sharded by itself, the rest at the root.

    >>> fabric = Fabric(strategy="reversible_fsdp", devices=2)
    >>> model = fabric.setup_module(model)
    >>> optimizer = fabric.setup_optimizers(torch.optim.Adam(model.parameters()))

    A module that `fully_shard` has already sharded is left as it is. Arguments: see `ReversibleFSDPStrategy`.
    """

    def __init__(
        self,
        targets: Targets | None = None,
        *,
        memory_budget: MemoryBudget | None = None,
        mp_policy: MixedPrecisionPolicy | None = None,
        offload_policy: OffloadPolicy | None = None,
        reshard_after_forward: bool | int | None = None,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        super().__init__(
            targets,
            memory_budget=memory_budget,
            parallelize_fn=self._shard,
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            **({} if timeout is None else {"timeout": timeout}),
        )
        self.policies = {
            "mp_policy": mp_policy, "offload_policy": offload_policy, "reshard_after_forward": reshard_after_forward,
        }  # fmt: skip

    @override
    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def _shard(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if not any(isinstance(m, FSDPModule) for m in module.modules()):
            shard(module, mesh["data_parallel"], **self.policies)
        return module
