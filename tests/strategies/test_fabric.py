"""Fabric's reversible strategies give what its stock strategies give."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import lightning_revlib as revlib
from tests.strategies.helpers import Net, fabric_fit


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_as_the_stock_strategy(precision: Any) -> None:
    plain, net, _ = fabric_fit(L.Fabric(accelerator="cpu", devices=1, precision=precision))
    keys = list(net.state_dict())
    for strategy in ("reversible", revlib.ReversibleFabricStrategy()):
        fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision, strategy=strategy)
        ours, net, _ = fabric_fit(fabric)
        assert ours == pytest.approx(plain, rel=1e-10 if precision == "64-true" else 1e-2)
        assert type(net.net) is revlib.ReversibleSequential and list(net.state_dict()) == keys
        assert not torch.distributed.is_initialized()


def test_a_backward_of_the_users_own() -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1, strategy="reversible")
    net = Net()
    model, _ = fabric.setup(net, torch.optim.Adam(net.parameters()))
    model(torch.randn(4, 8)).sum().backward()
    assert net.net.drift is not None and net.stem.weight.grad is not None


def test_several_devices_are_ddp() -> None:
    for name in ("reversible", "reversible_ddp", "reversible_spawn"):
        fabric = L.Fabric(accelerator="cpu", devices=2, strategy=name)
        assert type(fabric.strategy) is revlib.ReversibleFabricDDPStrategy
    strategy = revlib.ReversibleFabricStrategy(find_unused_parameters=True, start_method="spawn")
    L.Fabric(accelerator="cpu", devices=2, num_nodes=2, strategy=strategy)
    assert isinstance(strategy, revlib.ReversibleFabricDDPStrategy)
    assert strategy.num_nodes == 2 and strategy.world_size == 4


def test_targets_and_nothing_to_swap() -> None:
    class Plain(Net):
        def build(self) -> None:
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))  # type: ignore[assignment]

    targets = {"net": {"coupling": "midpoint"}}
    fabric = L.Fabric(accelerator="cpu", strategy=revlib.ReversibleFabricStrategy(targets))
    _, net, _ = fabric_fit(fabric, make=Plain)
    assert net.net.couplings == (revlib.Midpoint(),)

    class Other(Plain):
        def build(self) -> None:
            self.net = nn.Sequential(nn.Linear(16, 16))  # type: ignore[assignment]

    with pytest.raises(ValueError, match="nothing to swap"):
        fabric_fit(L.Fabric(accelerator="cpu", strategy="reversible"), make=Other)
