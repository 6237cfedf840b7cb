"""Reversible networks for PyTorch Lightning: constant activation memory by one word in the Trainer.

    import lightning_revlib as revlib
    trainer = lightning.Trainer(strategy="reversible")

Names are imported when they are first used: the command's help and completion wait neither for torch
nor for Lightning. Strategy names are registered as soon as Lightning is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from lightning_revlib.strategies.registry import REGISTRIES, register

if TYPE_CHECKING:
    from lightning_revlib.nn import *  # noqa: F403

__version__ = "0.1.0"

_LIGHTNING = {
    "ReversibleStrategy": "strategies.ddp",
    "ReversibleDDPStrategy": "strategies.ddp",
    "ReversibleFSDPStrategy": "strategies.fsdp",
    "ReversibleDeepSpeedStrategy": "strategies.deepspeed",
    "ReversibleFabricStrategy": "strategies.fabric",
    "ReversibleFabricDDPStrategy": "strategies.fabric",
    "ReversibleFabricFSDPStrategy": "strategies.fabric",
    "merge_checkpoint": "strategies.sharded_checkpoint",
    "ReversibleCallback": "callbacks.monitors",
    "ExactResume": "callbacks.resume",
    "SpeedMonitor": "callbacks.speed",
    "ActivationMemoryMonitor": "callbacks.monitors",
    "DriftMonitor": "callbacks.monitors",
    "CouplingAnnealing": "callbacks.annealing",
}


def __getattr__(name: str) -> Any:
    if name in _LIGHTNING:
        return getattr(importlib.import_module(f"lightning_revlib.{_LIGHTNING[name]}"), name)
    if name == "__all__":
        return [*importlib.import_module("lightning_revlib.nn").__all__, *_LIGHTNING]
    if not name.startswith("_"):
        if importlib.util.find_spec(f"lightning_revlib.{name}"):
            return importlib.import_module(f"lightning_revlib.{name}")
        nn = importlib.import_module("lightning_revlib.nn")
        if name in nn.__all__:
            return globals().setdefault(name, getattr(nn, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__getattr__("__all__")]


def _register() -> None:
    """Register the strategy names, now or when Lightning is imported: this import must not wait for it."""
    for name in REGISTRIES:
        if name in sys.modules:
            register(sys.modules[name])
        else:
            sys.meta_path.insert(0, _WhenLightningComes(name))


class _WhenLightningComes:
    """A finder that finds nothing, but lets the import of `target` be followed by our registration."""

    def __init__(self, target: str) -> None:
        self.target = target

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_register()
