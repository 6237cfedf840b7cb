"""The LightningModule, its data and the runs that the tests of strategies and callbacks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_revlib as revlib

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")
ENTRIES = ("fit", "validate", "test", "predict")
BUILT = ("init", "setup", "configure_model")
TOLERANCES = {"32-true": 1e-6, "64-true": 1e-12, "bf16-mixed": 4e-3, "bf16-true": 4e-3}


class Net(L.LightningModule):
    """A stack with batch norm and dropout, built in `__init__`, `setup` or `configure_model`."""

    def __init__(self, built: str = "init", dropout: float = 0.2) -> None:
        super().__init__()
        self.stem, self.head, self.built, self.dropout = nn.Linear(8, 16), nn.Linear(16, 1), built, dropout
        if built == "init":
            self.build()

    def build(self) -> None:
        blocks = [
            nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Dropout(self.dropout), nn.Tanh()) for _ in range(5)
        ]
        self.net = revlib.CoupledSequential(*blocks)

    def setup(self, stage: str) -> None:
        if self.built == "setup" and not hasattr(self, "net"):
            self.build()

    def configure_model(self) -> None:
        if self.built == "configure_model" and not hasattr(self, "net"):
            self.build()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(self.stem(x)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()
        self.losses = [*getattr(self, "losses", []), loss.detach()]
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self(batch[0]).square().mean())

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-2)


def data() -> DataLoader[Any]:
    """Return six batches of eight, the same in each call."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 8, generator=generator, dtype=torch.get_default_dtype())
    return DataLoader(TensorDataset(x), batch_size=8)


def trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    """Return a Trainer on the CPU for two epochs that prints and saves nothing, unless `options` say so."""
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 2, "default_root_dir": tmp_path, **quiet, **options})


def fit(tmp_path: Path, strategy: Any, make: Callable[[], Any] = Net, **options: Any) -> Any:
    """Make a module and train it from seed 5, with validation."""
    L.seed_everything(5, verbose=False)
    net = make()
    trainer(tmp_path, strategy=strategy, **options).fit(net, data(), data())
    return net


def whole(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return named tensors detached; sharded ones are gathered."""
    return {name: getattr(t, "full_tensor", lambda t=t: t)().detach() for name, t in dict(tensors).items()}


def distance(found: Mapping[Any, Tensor], expected: Mapping[Any, Tensor]) -> float:
    """Return the largest difference between two groups of tensors, which must have the same names."""
    assert list(found) == list(expected) and found
    pairs = zip(found.values(), expected.values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def outcome(
    tmp_path: Path,
    strategy: Any,
    entry: str,
    make: Callable[[], Any] = Net,
    is_swapped: bool | None = None,
    **options: Any,
) -> dict[Any, Tensor]:
    """Make a module and run one of the Trainer's entries from seed 5.

    Return the parameters after five steps, or the metrics, or the predictions. If `is_swapped` is not None, check
    that training has left the module so.
    """
    L.seed_everything(5, verbose=False)
    net = make()
    run = trainer(tmp_path, strategy=strategy, **{"max_steps": 5, "max_epochs": 10, **options})
    keys = list(net.state_dict())
    if entry == "fit":
        run.fit(net, data(), data())
        assert list(net.state_dict())[: len(keys)] == keys
        assert is_swapped is None or isinstance(net.net, revlib.ReversibleSequential) == is_swapped
        return whole(net.named_parameters())
    if entry == "predict":
        return dict(enumerate(run.predict(net, data()) or []))
    (metrics,) = getattr(run, entry)(net, data(), verbose=False)
    return {name: torch.tensor(value) for name, value in metrics.items()}


def fabric_fit(fabric: Any, is_sharded: bool = False, make: Callable[[], Any] = Net) -> tuple[list[float], Any, Any]:
    """Train by hand, the optimizer built before the setup; return the losses, the module and what setup returned."""
    fabric.launch()
    fabric.seed_everything(5)
    net = make()
    if is_sharded:
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
    return losses, net, model
