"""A user's program with every public name. test_program.py has `mypy --strict` check it, and runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import lightning_revlib as revlib
from lightning_revlib import COUPLINGS, CoupledSequential, ReversibleStrategy


class Halved(revlib.Alternating):
    """A coupling with half of the branch."""

    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return a + f / 2

    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return out - f / 2


class Net(L.LightningModule):
    """A module with a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.body = CoupledSequential(nn.Linear(8, 8), nn.Tanh(), coupling={"name": "momentum", "gamma": 0.9})

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.body(x), y)


def couplings() -> list[revlib.Coupling]:
    exact: revlib.Coupling = revlib.get_coupling("momentum", gamma=0.5)
    plain = [revlib.Additive(), revlib.Affine(), revlib.Midpoint(), revlib.Leapfrog(), revlib.BDIA(), Halved()]
    assert_type(revlib.Momentum(0.9).gamma, float)
    return [exact, *plain, revlib.Scaled(scale=0.5), *(cls() for cls in COUPLINGS.values())]


def plain_torch(x: Tensor) -> Tensor:
    steps: list[nn.Module] = [revlib.SpaceToDepth(2), revlib.Permutation(16), revlib.Orthogonal(16)]
    stack = revlib.ReversibleSequential(*steps, split_dim=1, coupling=revlib.Additive(), on_drift="raise")
    own = revlib.ReversibleSequential(
        nn.Linear(8, 8),
        coupling_forward=revlib.additive_coupling_forward,
        coupling_inverse=revlib.additive_coupling_inverse,
    )
    layers = revlib.ReversibleModuleList(list(own), coupling="midpoint", residual=True, treatments=["store"])
    step: revlib.Invertible = revlib.Invertible(revlib.SpaceToDepth(2))
    with revlib.MemoryMeter() as meter:
        y: Tensor = stack(x)
    assert_type(meter.peak, int)
    assert_type(stack.drift, float | None)
    assert_type(stack.inverse(y), Tensor)
    return layers[0](y) if step else y


def existing(model: nn.Module, batch: Tensor, hidden: Tensor, head: nn.Linear) -> str:
    assert_type(revlib.swap(model, {"layers": {"coupling": "midpoint"}}, inputs=batch), list[str])
    found = revlib.report(model, batch, max_change=0.1, progress=print)
    assert_type(found, revlib.Report)
    assert_type(revlib.restore(model), list[str])
    step = revlib.memory(model, batch, torch.optim.AdamW, simulate=True)
    assert_type(step, revlib.Memory)
    assert_type(step.to_dict(), dict[str, float])
    revlib.chunk_loss(model, tokens=512)
    assert_type(revlib.chunked_cross_entropy(hidden, head, batch), Tensor)
    callback = revlib.ReversibleTrainerCallback({"layers": {"coupling": "additive"}}, memory_budget="2GiB")
    return f"{found} {callback}"


def trainers(folder: Path) -> dict[str, Any]:
    strategies: list[Any] = [
        ReversibleStrategy({"body": {"coupling": "midpoint"}}, memory_budget=0.5, start_method="spawn"),
        revlib.ReversibleDDPStrategy(optimizer_in_backward=True),
        revlib.ReversibleFSDPStrategy(restore=True),
        revlib.ReversibleDeepSpeedStrategy(stage=2),
    ]
    callbacks: list[L.Callback] = [
        revlib.ReversibleCallback(memory_budget="auto"),
        revlib.ExactResume(),
        revlib.SpeedMonitor(every_n_steps=20),
        revlib.ActivationMemoryMonitor(),
        revlib.MemoryBreakdown(every_n_steps=200),
        revlib.DriftMonitor(),
        revlib.CouplingAnnealing(steps=100),
    ]
    fabric = [
        revlib.ReversibleFabricStrategy(),
        revlib.ReversibleFabricDDPStrategy(),
        revlib.ReversibleFabricFSDPStrategy(),
    ]
    for strategy in strategies:
        L.Trainer(strategy=strategy, callbacks=callbacks).fit(Net())
    L.Fabric(strategy=fabric[0]).launch()
    torch.save(merged := revlib.merge_checkpoint(folder), folder / "merged.ckpt")
    return merged


if __name__ == "__main__":
    print(revlib.__version__, couplings(), trainers(Path()))
