"""Reversible networks for PyTorch Lightning: constant activation memory by one word in the Trainer.

    import lightning_revlib as revlib
    trainer = lightning.Trainer(strategy="reversible")

Names are imported on first use, so that the help and the completion of the command line import neither torch nor
Lightning. Strategy names are registered as soon as Lightning is imported, before this package or after it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import wrapt

from lightning_revlib.strategies.registry import register_on_import

if TYPE_CHECKING:  # all public names for type checkers and editors; tests/test_init.py compares them with those below
    from lightning_revlib.accounting.memory import memory as memory
    from lightning_revlib.accounting.result import Memory as Memory
    from lightning_revlib.callbacks.annealing import CouplingAnnealing as CouplingAnnealing
    from lightning_revlib.callbacks.memory import MemoryBreakdown as MemoryBreakdown
    from lightning_revlib.callbacks.monitors import ActivationMemoryMonitor as ActivationMemoryMonitor
    from lightning_revlib.callbacks.monitors import DriftMonitor as DriftMonitor
    from lightning_revlib.callbacks.monitors import SpeedMonitor as SpeedMonitor
    from lightning_revlib.callbacks.resume import ExactResume as ExactResume
    from lightning_revlib.callbacks.swap import ReversibleCallback as ReversibleCallback
    from lightning_revlib.nn import *  # noqa: F403
    from lightning_revlib.pretrained.lazy_logits import chunk_loss as chunk_loss
    from lightning_revlib.pretrained.loss import chunked_cross_entropy as chunked_cross_entropy
    from lightning_revlib.pretrained.trainer import ReversibleTrainerCallback as ReversibleTrainerCallback
    from lightning_revlib.strategies.ddp import ReversibleDDPStrategy as ReversibleDDPStrategy
    from lightning_revlib.strategies.ddp import ReversibleStrategy as ReversibleStrategy
    from lightning_revlib.strategies.deepspeed import ReversibleDeepSpeedStrategy as ReversibleDeepSpeedStrategy
    from lightning_revlib.strategies.fabric import ReversibleFabricDDPStrategy as ReversibleFabricDDPStrategy
    from lightning_revlib.strategies.fabric import ReversibleFabricFSDPStrategy as ReversibleFabricFSDPStrategy
    from lightning_revlib.strategies.fabric import ReversibleFabricStrategy as ReversibleFabricStrategy
    from lightning_revlib.strategies.fsdp import ReversibleFSDPStrategy as ReversibleFSDPStrategy
    from lightning_revlib.strategies.sharded_checkpoint import merge_checkpoint as merge_checkpoint

__version__ = "0.2.0"

# public names outside of nn, and their modules
_MODULES = {
    "ReversibleStrategy": "strategies.ddp",
    "ReversibleDDPStrategy": "strategies.ddp",
    "ReversibleFSDPStrategy": "strategies.fsdp",
    "ReversibleDeepSpeedStrategy": "strategies.deepspeed",
    "ReversibleFabricStrategy": "strategies.fabric",
    "ReversibleFabricDDPStrategy": "strategies.fabric",
    "ReversibleFabricFSDPStrategy": "strategies.fabric",
    "merge_checkpoint": "strategies.sharded_checkpoint",
    "ReversibleCallback": "callbacks.swap",
    "ExactResume": "callbacks.resume",
    "SpeedMonitor": "callbacks.monitors",
    "ActivationMemoryMonitor": "callbacks.monitors",
    "MemoryBreakdown": "callbacks.memory",
    "DriftMonitor": "callbacks.monitors",
    "CouplingAnnealing": "callbacks.annealing",
    "memory": "accounting.memory",
    "Memory": "accounting.result",
    "chunk_loss": "pretrained.lazy_logits",
    "chunked_cross_entropy": "pretrained.loss",
}
_OPTIONAL = {"ReversibleTrainerCallback": "pretrained.trainer"}  # those that need transformers, which is no dependency


def __getattr__(name: str) -> Any:
    if (module := (_MODULES | _OPTIONAL).get(name)) is not None:
        return getattr(importlib.import_module(f"lightning_revlib.{module}"), name)
    if name == "__all__":
        return [*importlib.import_module("lightning_revlib.nn").__all__, *_MODULES]
    if not name.startswith("_"):
        if importlib.util.find_spec(f"lightning_revlib.{name}"):
            return importlib.import_module(f"lightning_revlib.{name}")
        nn = importlib.import_module("lightning_revlib.nn")
        if name in nn.__all__:
            return globals().setdefault(name, getattr(nn, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__getattr__("__all__"), *_OPTIONAL]


def _import_classes(cli: Any) -> None:
    """Import all classes: LightningCLI finds a short name, such as DriftMonitor, among those that are imported."""
    for module in _MODULES.values():
        importlib.import_module(f"lightning_revlib.{module}")


register_on_import()
wrapt.register_post_import_hook(_import_classes, "lightning.pytorch.cli")
