"""`Trainer(strategy="reversible")`: reversible stacks on one device, or on several by DDP."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_revlib.strategies.base import ReversibleStrategyMixin
from lightning_revlib.strategies.deferred import DeferredStrategy
from lightning_revlib.strategies.setup import MemoryBudget, Targets, check_arguments

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.plugins import Precision

StartMethod: TypeAlias = Literal["popen", "spawn", "fork", "forkserver"]


class AtomicCheckpoint(Strategy):
    """Mixin for a strategy: write a checkpoint whole or not at all, even if the process is killed meanwhile."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        path = str(filepath)
        if type(self.checkpoint_io) is not TorchCheckpointIO or "://" in path or not self.is_global_zero:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        part = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.part")
        super().save_checkpoint(checkpoint, part, storage_options)  # not atomic: it may copy from another disk
        os.replace(part, path)


class ReversibleDDPStrategy(AtomicCheckpoint, ReversibleStrategyMixin, DDPStrategy):
    """Lightning's DDPStrategy with reversible stacks. `ReversibleStrategy` becomes one on several devices.

    By the name "reversible_ddp" even a single process runs DDP. Arguments: see `ReversibleStrategy`.
    """

    strategy_name = "reversible_ddp"
    accepting = (DDPStrategy, DistributedDataParallel)


class ReversibleStrategy(AtomicCheckpoint, ReversibleStrategyMixin, DeferredStrategy, SingleDeviceStrategy):
    """Run the stacks of the LightningModule reversibly, on one device or several, of any kind.

    >>> Trainer(strategy="reversible")
    >>> Trainer(strategy=ReversibleStrategy(targets={"net.blocks": {"coupling": "additive"}}))
    >>> Trainer(strategy=ReversibleStrategy(memory_budget="2GiB"))
    >>> Trainer(strategy=ReversibleStrategy(find_unused_parameters=True), devices=4, num_nodes=2)

    With one process it is Lightning's SingleDeviceStrategy, without a process group. With more it
    becomes a `ReversibleDDPStrategy` as soon as the Trainer has counted its devices and nodes.

    The module is swapped in place (see `swap`) and stays so unless `restore` is set. State-dict
    keys, parameters and their order do not change, so that this strategy and the stock one read each
    other's checkpoints.

    Names: "reversible"; "reversible_spawn" and "reversible_fork", which set `start_method`;
    "reversible_find_unused_parameters_true".

    Args:
        targets: the modules to swap, by path, and the options of each, as in `swap`. Without, the attribute or method
            `reversible_targets` of the LightningModule; without that, every CoupledSequential.
        memory_budget: the most bytes that activations in stacks may take on each device: an int, a text such as
            "2GiB", a float as a fraction of ordinary autograd's peak, or "auto", nine tenths of the CUDA device's free
            memory. Without a budget, as few as possible.
        optimizer_in_backward: step each parameter as soon as backward has its gradient, and free the gradient.
        restore: undo the swap when the run ends, also if it fails.
        start_method: how several processes start: "popen" (the script runs again), "spawn" or "fork"; default "popen",
            in notebooks "fork".
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin: as in
            any of Lightning's strategies; the Trainer sets them.
        process_group_backend, timeout, **kwargs: for several processes, as in Lightning's
            DDPStrategy and torch's DistributedDataParallel.

    Raises:
        TypeError: for an unknown argument; for a subclass with several devices.
        ValueError: at setup, if nothing can be swapped or a target is wrong.
    """

    strategy_name = "reversible"
    distributed_class = ReversibleDDPStrategy

    def __init__(
        self,
        targets: Targets | None = None,
        *,
        memory_budget: MemoryBudget | None = None,
        optimizer_in_backward: bool = False,
        restore: bool = False,
        start_method: StartMethod | None = None,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        **kwargs: Any,
    ) -> None:
        check_arguments(type(self), kwargs, ReversibleStrategy, DDPStrategy, DistributedDataParallel)
        own: dict[str, Any] = {
            "targets": targets, "memory_budget": memory_budget, "optimizer_in_backward": optimizer_in_backward,
            "restore": restore,
        }  # fmt: skip
        super().__init__(**own, accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        launch = {"start_method": start_method, "process_group_backend": process_group_backend, "timeout": timeout}
        self.defer(parallel_devices, cluster_environment, {**own, **launch, **kwargs})
