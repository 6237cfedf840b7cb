"""Reversible networks for PyTorch Lightning: constant activation memory by one word in the Trainer.

    import lightning_revlib as revlib
    trainer = lightning.Trainer(strategy="reversible")

The names below that need Lightning are imported when they are first used; strategy names are
registered as soon as Lightning is there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_revlib.nn import *  # noqa: F403
from lightning_revlib.nn import __all__ as _nn

if TYPE_CHECKING:
    from lightning_revlib.callback import ActivationMemoryMonitor, DriftMonitor, ReversibleCallback
    from lightning_revlib.strategy import ReversibleStrategy

__version__ = "0.1.0"

_LIGHTNING = {
    "ReversibleStrategy": "strategy",
    "ReversibleCallback": "callback",
    "ActivationMemoryMonitor": "callback",
    "DriftMonitor": "callback",
}

__all__ = [*_nn, *_LIGHTNING]


def __getattr__(name: str) -> Any:
    if name in _LIGHTNING:
        return getattr(importlib.import_module(f"lightning_revlib.{_LIGHTNING[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
