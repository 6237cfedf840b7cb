"""The mixin of a strategy for one device that becomes one for several once devices and nodes have been counted."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.imports import _IS_INTERACTIVE

# attributes that the Trainer or Fabric sets; the strategy for several processes takes them as arguments
ASSIGNED = ("accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision", "precision_plugin")


class DeferredStrategy:
    """Mixin for a SingleDeviceStrategy, of Lightning's or of Fabric's: change its class if there are several processes.

    The object stays, since the user holds it. Its class changes, since Lightning asks for the class in order to
    choose samplers, BatchSizeFinder and Apple's devices. The class attribute `distributed_class` is the class for
    several processes.
    """

    # Not to be the first base of a class: an object's memory layout must not change with its class.
    distributed_class: type
    parallel_devices: list[torch.device] | None
    cluster_environment: Any
    _root_device: torch.device

    def defer(self, devices: list[torch.device] | None, cluster: Any, arguments: dict[str, Any]) -> None:
        """Keep the `arguments` of `distributed_class`, and set the attributes that the Trainer looks for."""
        arguments["start_method"] = arguments.get("start_method") or ("fork" if _IS_INTERACTIVE else "popen")
        self._arguments = {name: value for name, value in arguments.items() if value is not None}
        self.parallel_devices, self.cluster_environment = devices, cluster
        self.num_nodes = self._num_nodes = 1  # the Trainer sets the first, Fabric the second
        self._layer_sync: Any = None

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0] if self.parallel_devices else self._root_device

    def _configure_launcher(self) -> None:
        """Decide between one process and several; Lightning calls this last, when their number is known."""
        cluster = self.cluster_environment
        count = len(self.parallel_devices or ()) * max(self.num_nodes, self._num_nodes)
        if isinstance(cluster, SLURMEnvironment) and not cluster.detect():
            cluster = None  # given as a plugin outside of srun, which alone knows the world size
        if count > 1 or (cluster is not None and cluster.creates_processes_externally and cluster.world_size() > 1):
            self._become_distributed()

    def _become_distributed(self) -> None:
        cls: Any = type(self).distributed_class
        if "distributed_class" not in vars(type(self)):
            base = next(c for c in type(self).__mro__ if "distributed_class" in vars(c))
            raise TypeError(
                f"{type(self).__name__} is a subclass of {base.__name__} and so for one device; for several,"
                f" subclass {cls.__name__}"
            )
        before = dict(self.__dict__)
        self.__dict__.clear()
        self.__class__ = cls
        assigned = {name: before.get(f"_{name}", before.get(name)) for name in ASSIGNED}
        cls.__init__(self, **{k: v for k, v in assigned.items() if v is not None}, **before["_arguments"])
        self._num_nodes, self._layer_sync = max(before["num_nodes"], before["_num_nodes"]), before["_layer_sync"]
        getattr(self, "set_world_ranks", getattr(self, "_set_world_ranks", None))()  # type: ignore[misc]
        self._configure_launcher()
