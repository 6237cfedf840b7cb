"""`Trainer(strategy="reversible")`: reversible stacks on one device, or on many by DDP.

Importing this module registers the strategy names.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_revlib.nn.swap import Targets
from lightning_revlib.swapping import Swapping, check_arguments

if TYPE_CHECKING:
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
    from lightning.fabric.strategies import _StrategyRegistry
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.plugins import Precision

StartMethod: TypeAlias = Literal["popen", "spawn", "fork", "forkserver"]


class ReversibleDDPStrategy(Swapping, DDPStrategy):
    """Lightning's DDPStrategy with reversible stacks: what `ReversibleStrategy` is on several devices."""

    strategy_name = "reversible"

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """It has no name of its own."""


class ReversibleStrategy(Swapping, SingleDeviceStrategy):
    """Run the stacks of the LightningModule in constant activation memory, on one device or many, of any kind.

    >>> Trainer(strategy="reversible")
    >>> Trainer(strategy=ReversibleStrategy(targets={"net.blocks": {"coupling": "additive"}}))
    >>> Trainer(strategy=ReversibleStrategy(find_unused_parameters=True), devices=4, num_nodes=2)

    With one process it is Lightning's SingleDeviceStrategy, without a process group; with more it
    becomes a `ReversibleDDPStrategy` as soon as the Trainer has counted its devices and nodes. It
    changes its class and not the object, since Lightning asks strategies for theirs: samplers,
    BatchSizeFinder and Apple's devices depend on the answer.

    The module is swapped in place (see `swap`) and stays so unless `restore` is set. State-dict
    keys, parameters and their order do not change, so that checkpoints go both ways.

    Names: "reversible"; "reversible_spawn" and "reversible_fork" by the way in which processes
    start; "reversible_find_unused_parameters_true".

    Args:
        targets, optimizer_in_backward, restore: see `Swapping`.
        start_method: of the processes, if there are several; default "popen", in notebooks "fork".
        accelerator, parallel_devices, cluster_environment, checkpoint_io, precision_plugin: as in
            any of Lightning's strategies; the Trainer sets them.
        process_group_backend, timeout, **kwargs: for several processes, as in Lightning's
            DDPStrategy and torch's DistributedDataParallel.

    Raises:
        TypeError: for an unknown argument; for a subclass with several devices.
        ValueError: at setup, if nothing can be swapped or a target is wrong.
    """

    strategy_name = "reversible"

    def __init__(
        self,
        targets: Targets | None = None,
        *,
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
        ours: dict[str, Any] = {
            "targets": targets, "optimizer_in_backward": optimizer_in_backward, "restore": restore,
        }  # fmt: skip
        super().__init__(
            **ours, accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin
        )
        start_method = start_method or ("fork" if _IS_INTERACTIVE else "popen")
        self._ddp = {**ours, "start_method": start_method, "process_group_backend": process_group_backend, **kwargs}
        if timeout is not None:
            self._ddp["timeout"] = timeout
        # the Trainer sets these on a strategy that has them
        self.parallel_devices = parallel_devices
        self.cluster_environment = cluster_environment
        self.num_nodes = 1
        self._layer_sync: Any = None

    @property
    @override
    def root_device(self) -> torch.device:
        return self.parallel_devices[0] if self.parallel_devices else self._root_device

    @override
    def _configure_launcher(self) -> None:
        """The last call in configuring a strategy: now it is known how many processes there are."""
        outside = self.cluster_environment
        count = len(self.parallel_devices or ()) * self.num_nodes
        if count > 1 or (outside is not None and outside.creates_processes_externally and outside.world_size() > 1):
            self._become_many()

    def _become_many(self) -> None:
        if type(self) is not ReversibleStrategy:
            raise TypeError(
                f"{type(self).__name__} is a subclass of ReversibleStrategy and so for one device; for several,"
                " subclass ReversibleDDPStrategy"
            )
        arguments, num_nodes, layer_sync = self._ddp, self.num_nodes, self._layer_sync
        for name in ("accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision_plugin"):
            arguments[name] = self.__dict__.get(f"_{name}", self.__dict__.get(name))
        self.__dict__.clear()
        self.__class__ = ReversibleDDPStrategy  # type: ignore[assignment]
        ReversibleDDPStrategy.__init__(self, **arguments)
        self.num_nodes, self._layer_sync = num_nodes, layer_sync
        self.set_world_ranks()  # type: ignore[attr-defined]
        self._configure_launcher()

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        names: dict[str, dict[str, Any]] = {
            cls.strategy_name: {},
            f"{cls.strategy_name}_spawn": {"start_method": "spawn"},
            f"{cls.strategy_name}_fork": {"start_method": "fork"},
            f"{cls.strategy_name}_find_unused_parameters_true": {"find_unused_parameters": True},
        }
        for name, arguments in names.items():
            what = "reversible stacks in constant activation memory, on one device or by DDP"
            strategy_registry.register(name, cls, description=what, override=True, **arguments)


ReversibleStrategy.register_strategies(StrategyRegistry)
