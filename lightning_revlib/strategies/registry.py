"""The strategies' names, for `Trainer(strategy=...)` and `Fabric(strategy=...)`: what each stands for.

Registering a name imports nothing; its class is imported when a Trainer asks for it.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

#     name: (class, its arguments)
NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "reversible": ("ReversibleStrategy", {}),
    "reversible_spawn": ("ReversibleStrategy", {"start_method": "spawn"}),
    "reversible_fork": ("ReversibleStrategy", {"start_method": "fork"}),
    "reversible_find_unused_parameters_true": ("ReversibleStrategy", {"find_unused_parameters": True}),
    "reversible_ddp": ("ReversibleDDPStrategy", {}),
    "reversible_fsdp": ("ReversibleFSDPStrategy", {}),
    "reversible_deepspeed_stage_1": ("ReversibleDeepSpeedStrategy", {"stage": 1}),
    "reversible_deepspeed_stage_1_offload": ("ReversibleDeepSpeedStrategy", {"stage": 1, "offload_optimizer": True}),
    "reversible_deepspeed_stage_2": ("ReversibleDeepSpeedStrategy", {"stage": 2}),
    "reversible_deepspeed_stage_2_offload": ("ReversibleDeepSpeedStrategy", {"stage": 2, "offload_optimizer": True}),
    "reversible_deepspeed_stage_3": ("ReversibleDeepSpeedStrategy", {"stage": 3}),
    "reversible_deepspeed_stage_3_offload": (
        "ReversibleDeepSpeedStrategy",
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True},
    ),
}
FABRIC_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "reversible": ("ReversibleFabricStrategy", {}),
    "reversible_spawn": ("ReversibleFabricStrategy", {"start_method": "spawn"}),
    "reversible_fork": ("ReversibleFabricStrategy", {"start_method": "fork"}),
    "reversible_ddp": ("ReversibleFabricDDPStrategy", {}),
    "reversible_fsdp": ("ReversibleFabricFSDPStrategy", {}),
}
#     module of Lightning: (its registry, names)
REGISTRIES = {
    "lightning.pytorch.strategies": ("StrategyRegistry", NAMES),
    "lightning.fabric.strategies": ("STRATEGY_REGISTRY", FABRIC_NAMES),
}


def register(module: Any) -> None:
    """Put the names into the registry of one of those modules."""
    registry, names = REGISTRIES[module.__name__]
    for name, (cls, arguments) in names.items():
        what = f"reversible stacks in constant activation memory: lightning_revlib.{cls}"
        getattr(module, registry).register(name, partial(_make, cls), description=what, override=True, **arguments)


def _make(cls: str, **arguments: Any) -> Any:
    return getattr(importlib.import_module("lightning_revlib"), cls)(**arguments)
