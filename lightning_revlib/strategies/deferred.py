"""A strategy that is for one device until the Trainer, or Fabric, has counted devices and nodes."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.utilities.imports import _IS_INTERACTIVE

PARTS = ("accelerator", "parallel_devices", "cluster_environment", "checkpoint_io", "precision", "precision_plugin")


class OneOrMany:
    """Mixin for a SingleDeviceStrategy, of Lightning's or of Fabric's: with several processes it changes its class.

    The object stays. Its class has to change, since Lightning asks for it: samplers, BatchSizeFinder
    and Apple's devices depend on the answer. The class attribute `many` is the class for several
    processes; `arguments` are those for its `__init__`.
    """

    # NOTE: to be no first base, since an object's layout must not change with its class
    base: type
    many: type
    parallel_devices: list[torch.device] | None
    cluster_environment: Any
    _root_device: torch.device

    def await_devices(self, devices: list[torch.device] | None, cluster: Any, arguments: dict[str, Any]) -> None:
        """Set what the Trainer asks a strategy for, before it counts."""
        arguments["start_method"] = arguments.get("start_method") or ("fork" if _IS_INTERACTIVE else "popen")
        self._arguments = {name: value for name, value in arguments.items() if value is not None}
        self.parallel_devices, self.cluster_environment = devices, cluster
        self.num_nodes = self._num_nodes = 1  # the Trainer sets the one, Fabric the other
        self._layer_sync: Any = None

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0] if self.parallel_devices else self._root_device

    def _configure_launcher(self) -> None:
        """The last call in configuring a strategy: now it is known how many processes there are."""
        outside = self.cluster_environment
        count = len(self.parallel_devices or ()) * max(self.num_nodes, self._num_nodes)
        if count > 1 or (outside is not None and outside.creates_processes_externally and outside.world_size() > 1):
            self._become_many()

    def _become_many(self) -> None:
        cls: Any = type(self).many
        if type(self) is not self.base:
            raise TypeError(
                f"{type(self).__name__} is a subclass of {self.base.__name__} and so for one device; for several,"
                f" subclass {cls.__name__}"
            )
        before = dict(self.__dict__)
        self.__dict__.clear()
        self.__class__ = cls
        parts = {name: before.get(f"_{name}", before.get(name)) for name in PARTS}
        cls.__init__(self, **{k: v for k, v in parts.items() if v is not None}, **before["_arguments"])
        self._num_nodes, self._layer_sync = max(before["num_nodes"], before["_num_nodes"]), before["_layer_sync"]
        getattr(self, "set_world_ranks", getattr(self, "_set_world_ranks", None))()  # type: ignore[misc]
        self._configure_launcher()
