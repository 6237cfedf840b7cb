from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import lightning_revlib as revlib
from tests.test_strategy import Net, data


def loop(fabric: Any, fsdp: bool = False, cls: type[Net] = Net) -> tuple[list[float], Any]:
    """A training by hand, the optimizer built before the setup, as users of Fabric do."""
    fabric.launch()
    fabric.seed_everything(5)
    net = cls()
    if fsdp:
        model = fabric.setup_module(net)
        optimizer = fabric.setup_optimizers(torch.optim.Adam(net.parameters(), 1e-2))
    else:
        model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), 1e-2))
    losses = []
    for (x,) in fabric.setup_dataloaders(data()):
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses, net


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_as_the_stock_strategy(precision: Any) -> None:
    plain, net = loop(L.Fabric(accelerator="cpu", devices=1, precision=precision))
    keys = list(net.state_dict())
    for strategy in ("reversible", revlib.ReversibleFabricStrategy()):
        fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision, strategy=strategy)
        ours, net = loop(fabric)
        assert ours == pytest.approx(plain, rel=1e-10 if precision == "64-true" else 1e-2)
        assert type(net.net) is revlib.ReversibleSequential and list(net.state_dict()) == keys
        assert not torch.distributed.is_initialized()


def test_several_devices_are_ddp() -> None:
    for name in ("reversible", "reversible_ddp", "reversible_spawn"):
        fabric = L.Fabric(accelerator="cpu", devices=2, strategy=name)
        assert type(fabric.strategy) is revlib.ReversibleFabricDDPStrategy
    strategy = revlib.ReversibleFabricStrategy(find_unused_parameters=True, start_method="spawn")
    L.Fabric(accelerator="cpu", devices=2, num_nodes=2, strategy=strategy)
    assert isinstance(strategy, revlib.ReversibleFabricDDPStrategy)
    assert strategy._ddp_kwargs == {"find_unused_parameters": True} and strategy.num_nodes == 2
    assert strategy.world_size == 4


def test_targets_and_nothing_to_swap() -> None:
    class Plain(Net):
        def build(self) -> None:
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))  # type: ignore[assignment]

    targets = {"net": {"coupling": "midpoint"}}
    _, net = loop(L.Fabric(accelerator="cpu", strategy=revlib.ReversibleFabricStrategy(targets)), cls=Plain)
    assert net.net.couplings == (revlib.Midpoint(),)

    class Other(Plain):
        def build(self) -> None:
            self.net = nn.Sequential(nn.Linear(16, 16))  # type: ignore[assignment]

    with pytest.raises(ValueError, match="nothing to swap"):
        loop(L.Fabric(accelerator="cpu", strategy="reversible"), cls=Other)
