"""Reversible networks for PyTorch Lightning: constant activation memory by one word in the Trainer.

    import lightning_revlib as revlib
    trainer = lightning.Trainer(strategy="reversible")

Names are imported on first use, so that the help and the completion of the command line import neither torch nor
Lightning. Strategy names are registered as soon as Lightning is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from lightning_revlib.strategies.registry import register_on_import

if TYPE_CHECKING:
    from lightning_revlib.nn import *  # noqa: F403

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
    "DriftMonitor": "callbacks.monitors",
    "CouplingAnnealing": "callbacks.annealing",
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


register_on_import()
