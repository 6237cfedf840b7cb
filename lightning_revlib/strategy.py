"""Lightning strategies that run a model's stacks reversibly: the swap of `nn.swap` at the right moments.

Importing this module registers the strategy names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy, StrategyRegistry
from typing_extensions import override

from lightning_revlib.nn.swap import Targets, find, swap

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.fabric.strategies import _StrategyRegistry


class Swapping(Strategy):
    """Mixin for a strategy: swaps before hooks see the module, and again what `setup` and `configure_model` built."""

    targets: Targets | None = None

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        assert self.lightning_module is not None
        swap_module(self.lightning_module, self.targets, strict=False)

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        assert self.lightning_module is not None
        swap_module(self.lightning_module, self.targets)
        super().setup(trainer)


class ReversibleStrategy(Swapping, SingleDeviceStrategy):
    """Run the stacks of the LightningModule in constant activation memory, on one device of any kind.

    >>> Trainer(strategy="reversible")
    >>> Trainer(strategy=ReversibleStrategy(targets={"net.blocks": {"coupling": "additive"}}))

    The module is swapped in place (see `swap`) and stays so: `restore(module)` undoes it. State-dict
    keys, parameters and their order do not change, so that checkpoints go both ways.

    Args:
        targets: which modules, and with which options, as in `swap`. Without, the module's attribute
            or method `reversible_targets`; without that, every CoupledSequential.
        **kwargs: of `SingleDeviceStrategy`.

    Raises:
        ValueError: at setup, if nothing can be swapped or a target is wrong; when a Trainer gives it
            more than one device.
    """

    strategy_name = "reversible"

    def __init__(self, targets: Targets | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.targets = targets

    @property
    def parallel_devices(self) -> list[torch.device]:
        """Empty, so that the Trainer sets it: a single-device strategy does not learn its device otherwise."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise ValueError(
                f"strategy='reversible' runs on one device, and the Trainer has {len(devices)}: pass devices=1, or"
                " keep strategy='ddp' and add callbacks=[ReversibleCallback()]"
            )
        if devices:
            self._root_device = torch.device(devices[0])

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        strategy_registry.register(
            cls.strategy_name, cls, description="reversible stacks in constant activation memory", override=True
        )


def swap_module(module: pl.LightningModule, targets: Targets | None, *, strict: bool = True) -> list[str]:
    """`swap` with the targets given, or else those that the LightningModule names itself."""
    if targets is None:
        targets = getattr(module, "reversible_targets", None)
        if callable(targets):
            targets = targets()
    if not strict and not find(module, targets, strict=False):
        return []
    return swap(module, targets, strict=strict)


ReversibleStrategy.register_strategies(StrategyRegistry)
