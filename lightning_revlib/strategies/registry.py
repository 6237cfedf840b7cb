"""The strategies' names, for `Trainer(strategy=...)` and `Fabric(strategy=...)`.

Registering a name imports no strategy. Its class is imported when a Trainer asks for it.

A program has to import lightning_revlib. Lightning loads no entry point before the Trainer looks up its strategy, and
the group "torch.backends", which `import torch` loads, would bring this package into every process that uses torch.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import wrapt

#     name: (module of this package and class, the arguments of the class)
NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "reversible": ("ddp.ReversibleStrategy", {}),
    "reversible_spawn": ("ddp.ReversibleStrategy", {"start_method": "spawn"}),
    "reversible_fork": ("ddp.ReversibleStrategy", {"start_method": "fork"}),
    "reversible_find_unused_parameters_true": ("ddp.ReversibleStrategy", {"find_unused_parameters": True}),
    "reversible_ddp": ("ddp.ReversibleDDPStrategy", {}),
    "reversible_fsdp": ("fsdp.ReversibleFSDPStrategy", {}),
    # of `--trainer.strategy=ReversibleStrategy`, which LightningCLI passes on as a name, and the Trainer lowers
    "reversiblestrategy": ("ddp.ReversibleStrategy", {}),
    "reversibleddpstrategy": ("ddp.ReversibleDDPStrategy", {}),
    "reversiblefsdpstrategy": ("fsdp.ReversibleFSDPStrategy", {}),
    "reversibledeepspeedstrategy": ("deepspeed.ReversibleDeepSpeedStrategy", {}),
    **{
        f"reversible_deepspeed_stage_{stage}": ("deepspeed.ReversibleDeepSpeedStrategy", {"stage": stage})
        for stage in (1, 2, 3)
    },
    **{
        f"reversible_deepspeed_stage_{stage}_offload": (
            "deepspeed.ReversibleDeepSpeedStrategy",
            {"stage": stage, "offload_optimizer": True, **({"offload_parameters": True} if stage == 3 else {})},
        )
        for stage in (1, 2, 3)
    },
}
FABRIC_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "reversible": ("fabric.ReversibleFabricStrategy", {}),
    "reversible_spawn": ("fabric.ReversibleFabricStrategy", {"start_method": "spawn"}),
    "reversible_fork": ("fabric.ReversibleFabricStrategy", {"start_method": "fork"}),
    "reversible_ddp": ("fabric.ReversibleFabricDDPStrategy", {}),
    "reversible_fsdp": ("fabric.ReversibleFabricFSDPStrategy", {}),
}
#     module of Lightning: (its registry, the names that go into it)
REGISTRIES = {
    "lightning.pytorch.strategies": ("StrategyRegistry", NAMES),
    "lightning.fabric.strategies": ("STRATEGY_REGISTRY", FABRIC_NAMES),
}


def register_on_import() -> None:
    """Register all names, and what warns on load, now or as soon as Lightning is imported."""
    for module in REGISTRIES:
        wrapt.register_post_import_hook(register, module)
    wrapt.register_post_import_hook(warn_on_load, "lightning.pytorch.core.module")


def warn_on_load(module: Any) -> None:
    """Have `LightningModule.on_load_checkpoint`, which is empty, warn if a checkpoint's module had other stacks.

    `load_from_checkpoint` has no other hook, and no strategy is asked. A module with an `on_load_checkpoint` of its own
    is warned if that calls super's.
    """
    module.LightningModule.on_load_checkpoint = _on_load_checkpoint


def _on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
    """See `lightning.pytorch.core.hooks.CheckpointHooks`."""
    if saved := checkpoint.get("reversible_targets"):
        importlib.import_module("lightning_revlib.strategies.saved_targets").warn_of_differences(self, saved)


def register(module: Any) -> None:
    """Register the names that belong to `module`, which is one of `REGISTRIES`."""
    registry, names = REGISTRIES[module.__name__]
    for name, (path, arguments) in names.items():
        description = f"reversible stacks in constant activation memory: lightning_revlib.{path.split('.')[1]}"
        getattr(module, registry).register(
            name, partial(_make, path), description=description, override=True, **arguments
        )


def _make(path: str, **arguments: Any) -> Any:
    module, cls = path.split(".")
    return getattr(importlib.import_module(f"lightning_revlib.strategies.{module}"), cls)(**arguments)
