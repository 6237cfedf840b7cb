"""CouplingAnnealing starts from the function of the original network and reaches that of the coupling."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_revlib as revlib


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Residual() for _ in range(6)])
        self.rows: list[tuple[float, bool, float]] = []
        self.outputs: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch
        for layer in self.layers:
            x = layer(x)
        self.outputs.append(x.detach())
        return x.square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        """Note gamma, whether activations were stored, and the drift, which is None until backward has inverted."""
        stack: Any = self.layers
        self.rows.append((getattr(stack.couplings[0], "gamma", -1), stack.drift is None, stack.drift or 0))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def targets(coupling: Any, **options: Any) -> Any:
    return {"layers": {"coupling": coupling, "residual": True, **options}}


def fit(module: Module, callbacks: list[Any], strategy: Any, **kwargs: Any) -> L.Trainer:
    """Train with a strategy, or with the default one and this coupling for the layers."""
    if isinstance(strategy, dict) or strategy == "midpoint":
        strategy = revlib.ReversibleStrategy(targets(strategy))
    trainer = L.Trainer(
        strategy=strategy, callbacks=callbacks, logger=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, enable_checkpointing=False, **kwargs,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randn(12, 3, 4), batch_size=None))
    return trainer


def test_gamma_grows_from_the_original_network_to_the_stacks_own() -> None:
    module = Module()
    fit(module, [revlib.CouplingAnnealing(steps=8)], {"name": "momentum", "gamma": 0.8}, max_epochs=1)
    gammas, stored, drifts = zip(*module.rows, strict=True)
    assert gammas == pytest.approx([0.8 * min(1, i / 8) for i in range(12)])
    assert stored == (True, True, *[False] * 10) and max(drifts) < 1e-3
    stack: Any = module.layers
    assert stack.couplings == (revlib.Momentum(0.8),) and set(stack.treatments) == {"reversible"}


def test_the_first_step_is_the_original_networks() -> None:
    module = Module()
    original = copy.deepcopy(module)
    batch = torch.randn(1, 3, 4)
    trainer = L.Trainer(
        strategy=revlib.ReversibleStrategy(targets={"layers": {"coupling": "scaled"}}), max_steps=1, logger=False,
        callbacks=[revlib.CouplingAnnealing(steps=4)], enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batch, batch_size=None))
    original.training_step(batch[0], 0)
    assert torch.allclose(module.outputs[0], original.outputs[0], atol=1e-6)


def test_nothing_to_anneal_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"is for momentum and scaled without grid_bits, and the stacks have layers: Midpoint"
    ):
        fit(Module(), [revlib.CouplingAnnealing(steps=8)], "midpoint", max_epochs=1)
    with pytest.raises(ValueError, match="steps='3': take at least one"):
        revlib.CouplingAnnealing("3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps=0: take at least one"):
        revlib.CouplingAnnealing(0)


def test_a_grid_that_is_not_chosen_yet_is_an_error() -> None:
    strategy = revlib.ReversibleStrategy(targets({"name": "momentum", "gamma": 0.5}, grid_bits="auto"))
    with pytest.raises(ValueError, match=r"without grid_bits, and the stacks have layers: Momentum\(gamma=0\.5"):
        fit(Module(), [revlib.CouplingAnnealing(steps=8)], strategy, max_epochs=1)


def test_an_interrupted_run_goes_on() -> None:
    module, callback = Module(), revlib.CouplingAnnealing(steps=8)
    trainer = fit(module, [callback], {"name": "momentum", "gamma": 0.8}, max_steps=3)
    pickle.dumps(callback)
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(module, DataLoader(torch.randn(20, 3, 4), batch_size=None))
    assert module.rows[3][0] == pytest.approx(0.3) and module.rows[-1][0] == 0.8


class Validated(Module):
    def val_dataloader(self) -> Any:
        return DataLoader(torch.randn(1, 3, 4), batch_size=None)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        stack: Any = self.layers
        self.validated = [*getattr(self, "validated", []), stack.couplings[0].gamma]


def test_validation_sees_the_coupling_as_it_is() -> None:
    module = Validated()
    swapping = revlib.ReversibleCallback(targets({"name": "momentum", "gamma": 0.8}))
    fit(module, [swapping, revlib.CouplingAnnealing(steps=8)], "auto", max_epochs=1, val_check_interval=4)
    assert module.validated == pytest.approx([0.8, 0.3, 0.7, 0.8])  # the first is the check before training
    assert [row[0] for row in module.rows] == pytest.approx([0.8 * min(1, i / 8) for i in range(12)])


def test_branches_count_as_steps() -> None:
    module = Module()
    branches = targets({"name": "momentum", "gamma": 0.8}, residual=False, branches=[["net"], ["net"]])
    fit(module, [revlib.CouplingAnnealing(steps=8)], revlib.ReversibleStrategy(branches), max_epochs=1)
    assert [stored for _, stored, _ in module.rows] == [True] * 5 + [False] * 7


@pytest.mark.parametrize("by", ["stack", "strategy", "callback"])
def test_a_memory_budget_cannot_be_annealed(by: str) -> None:
    coupling = {"name": "momentum", "gamma": 0.8}
    callbacks: list[Any] = [revlib.CouplingAnnealing(steps=8)]
    strategy: Any = "auto"
    if by == "stack":
        strategy = revlib.ReversibleStrategy(targets(coupling, memory_budget=0.5))
    elif by == "strategy":
        strategy = revlib.ReversibleStrategy(targets(coupling), memory_budget=0.5)
    else:
        callbacks.insert(0, revlib.ReversibleCallback(targets(coupling), memory_budget=0.5))
    with pytest.raises(ValueError, match=r"memory_budget=0\.5 of layers: .* leave out"):
        fit(Module(), callbacks, strategy, max_epochs=1)
