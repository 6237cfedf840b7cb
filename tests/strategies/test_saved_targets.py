"""A checkpoint says what its module's stacks computed; a module that computes something else is told, or swapped."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.strategies.helpers import Net, data, trainer


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Plain(Net):
    """Has containers that only targets make reversible."""

    def build(self) -> None:
        self.net = nn.Sequential(*[Residual() for _ in range(3)])  # type: ignore[assignment]
        self.layers = nn.ModuleList([Residual() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.net(self.stem(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


TARGETS: Any = {
    "net": {"coupling": [{"name": "momentum", "gamma": 0.5}, {"name": "momentum", "gamma": 0.6}], "residual": True,
            "split_dim": None},
    "layers": {"coupling": "midpoint", "residual": True, "grid_bits": 12, "ordinary": 1},
}  # fmt: skip
DIFFERS = "computes another function"


def saved(tmp_path: Path, by: str = "strategy", make: Any = Plain, targets: Any = TARGETS, **options: Any) -> Any:
    """Train with targets; return the checkpoint's path and its outputs' mean square."""
    L.seed_everything(5, verbose=False)
    if by == "strategy":
        options |= {"strategy": revlib.ReversibleStrategy(targets)}
    else:
        options |= {"callbacks": [revlib.ReversibleCallback(targets)]}
    run, net = trainer(tmp_path, max_epochs=1, **options), make()
    run.fit(net, data())
    run.save_checkpoint(path := tmp_path / "a.ckpt")
    (metrics,) = run.test(net, data(), verbose=False)
    return path, metrics["loss"]


def loss_of(tmp_path: Path, net: Any, strategy: Any, path: Any = None) -> float:
    return trainer(tmp_path, strategy=strategy).test(net, data(), ckpt_path=path, verbose=False)[0]["loss"]


@pytest.mark.parametrize("by", ["strategy", "callback"])
def test_a_module_loaded_without_its_targets_is_told(tmp_path: Path, by: str) -> None:
    path, expected = saved(tmp_path, by)
    with pytest.warns(UserWarning, match=DIFFERS) as caught:
        net = Plain.load_from_checkpoint(path, weights_only=True)
    (message,) = [str(w.message) for w in caught if DIFFERS in str(w.message)]
    assert "'net'" in message and "'layers'" in message and "\n" not in message
    assert loss_of(tmp_path, net, "auto") != pytest.approx(expected, rel=1e-3)
    revlib.swap(net, torch.load(path, weights_only=True)["reversible_targets"])
    assert loss_of(tmp_path, net, "auto") == pytest.approx(expected, rel=1e-6)
    with pytest.warns(UserWarning, match=DIFFERS):
        loss_of(tmp_path, Plain(), "auto", path)


def test_the_strategy_without_targets_takes_those_of_the_checkpoint(tmp_path: Path) -> None:
    path, expected = saved(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{DIFFERS}")
        assert loss_of(tmp_path, net := Plain(), "reversible", path) == pytest.approx(expected, rel=1e-6)
        assert loss_of(tmp_path, Plain(), revlib.ReversibleStrategy(TARGETS), path) == pytest.approx(expected, rel=1e-6)
    assert net.net.couplings == (revlib.Momentum(0.5), revlib.Momentum(0.6)) and net.layers.ordinary == 1
    trainer(tmp_path, strategy="reversible", max_epochs=2).fit(net := Plain(), data(), ckpt_path=path)
    assert isinstance(net.layers, revlib.ReversibleModuleList) and net.layers.drift == 0


@pytest.mark.parametrize("entry", ["fit", "test"])
def test_other_targets_than_those_of_the_checkpoint_are_told(tmp_path: Path, entry: str) -> None:
    path, _ = saved(tmp_path)
    targets = {**TARGETS, "net": {**TARGETS["net"], "coupling": {"name": "momentum", "gamma": 0.7}}}
    run = trainer(tmp_path, strategy=revlib.ReversibleStrategy(targets), max_epochs=2)
    with pytest.warns(UserWarning, match=r"trained with \{'net': .*'gamma': 0.5.*this one has \{'net': .*'gamma': 0.7"):
        getattr(run, entry)(Plain(), data(), ckpt_path=path)


def test_stacks_of_the_module_itself_are_no_difference(tmp_path: Path) -> None:
    path, expected = saved(tmp_path, make=Net, targets=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{DIFFERS}")
        assert loss_of(tmp_path, Net.load_from_checkpoint(path), "auto") == pytest.approx(expected, rel=1e-6)
        assert loss_of(tmp_path, Net(), "reversible", path) == pytest.approx(expected, rel=1e-6)


class Mine(revlib.Additive):
    """A coupling without a name, which no checkpoint can make again."""


def test_a_coupling_of_the_users_own_and_annealing(tmp_path: Path) -> None:
    options = {"residual": True, "split_dim": None}
    path, _ = saved(tmp_path, targets={"net": {"coupling": Mine(), **options}})
    with pytest.warns(UserWarning, match="trained with .*'coupling': {'name': 'Mine'}"):
        Plain.load_from_checkpoint(path)
    targets = {"net": {"coupling": {"name": "momentum", "gamma": 0.8}, **options}}

    def annealed() -> L.Trainer:
        strategy = revlib.ReversibleStrategy(targets)
        return trainer(tmp_path, strategy=strategy, callbacks=[revlib.CouplingAnnealing(steps=12)])

    run = annealed()
    run.fit_loop.max_epochs = 1
    run.fit(Plain(), data())
    run.save_checkpoint(path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{DIFFERS}")
        annealed().fit(Plain(), data(), ckpt_path=path)
    with pytest.warns(UserWarning, match=DIFFERS):
        loss_of(tmp_path, Plain(), revlib.ReversibleStrategy(targets), path)


@pytest.mark.parametrize("by", ["targets", "attribute", "callback"])
def test_a_grid_that_was_chosen_stays(tmp_path: Path, by: str) -> None:
    """It is chosen for large values; validation and a run that resumes see small ones, for which it would be finer."""

    class Chosen(Plain):
        if by == "attribute":
            reversible_targets: Any = AUTO

    def run(**options: Any) -> L.Trainer:
        how: Any = {"strategy": revlib.ReversibleStrategy(AUTO if by == "targets" else None)}
        return trainer(
            tmp_path, **options, **({"callbacks": [revlib.ReversibleCallback(AUTO)]} if by == "callback" else how)
        )

    net, first = Chosen(), run(max_epochs=1)
    with torch.no_grad():
        net.stem.weight *= 1000
    first.fit(net, data())
    bits = net.layers.grid_bits
    with torch.no_grad():
        net.stem.weight /= 1000
    first.validate(net, data(), verbose=False)
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = Chosen()
    run(max_epochs=2).fit(again, data(), ckpt_path=tmp_path / "a.ckpt")
    assert 0 < bits == net.layers.grid_bits == again.layers.grid_bits < 16
    revlib.swap(net, {"layers": {"coupling": "midpoint", "grid_bits": "auto"}})
    assert net.layers.grid_bits == "auto"  # another function
    revlib.swap(net, {"layers": {"grid_bits": 10}})
    revlib.swap(net, {"layers": {"grid_bits": "auto"}})
    assert net.layers.grid_bits == "auto"  # 10 was given, not chosen


AUTO: Any = {"layers": {"coupling": {"name": "momentum", "gamma": 0.25}, "residual": True, "grid_bits": "auto"}}


def velocity(x: Tensor) -> Tensor:
    return x * 0.5


def test_a_function_of_a_coupling_is_not_lost(tmp_path: Path) -> None:
    targets = {"layers": {"coupling": {"name": "momentum", "gamma": 0.5, "init": velocity}, "residual": True}}
    path, _ = saved(tmp_path, targets=targets)
    with pytest.raises(ValueError, match=r"target 'layers': .* init=<velocity> stands for what a checkpoint"):
        trainer(tmp_path, strategy="reversible").test(Plain(), data(), ckpt_path=path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{DIFFERS}")
        trainer(tmp_path, strategy=revlib.ReversibleStrategy(targets)).test(Plain(), data(), ckpt_path=path)


class WithCoupling(Net):
    def __init__(self, coupling: revlib.Coupling) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_a_coupling_among_the_hyperparameters_is_read_by_other_strategies(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, make=lambda: WithCoupling(revlib.Momentum(0.5)), targets=None)
    trainer(tmp_path, strategy="auto").test(WithCoupling(revlib.Momentum(0.5)), data(), ckpt_path=path)
    assert WithCoupling.load_from_checkpoint(path, weights_only=True).hparams.coupling == revlib.Momentum(0.5)


class Cycled(revlib.Alternating):
    """Has options of all kinds, of which only `weights` is given."""

    def __init__(self, weights: Any = (1.0, 1.0), dtype: torch.dtype = torch.float32, more: Any = None) -> None:
        self.weights, self.dtype, self.more = tuple(weights), dtype, more or {}

    def combine(self, a: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return self.weights[0] * a + self.weights[1] * f

    def solve(self, out: Tensor, b: Tensor, f: Tensor) -> Tensor:
        return (out - self.weights[1] * f) / self.weights[0]


def test_options_of_ones_own_coupling_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(revlib.COUPLINGS, "cycled", Cycled)
    path, loss = saved(tmp_path, targets={"layers": {"coupling": {"name": "cycled", "weights": (0.5, 2.0)}}})
    (metrics,) = trainer(tmp_path, strategy="reversible").test(Plain(), data(), ckpt_path=path, verbose=False)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_checkpoint_that_says_less_of_a_coupling_is_taken(tmp_path: Path) -> None:
    targets = {"layers": {"coupling": {"name": "momentum", "gamma": 0.5, "init": velocity}, "residual": True}}
    path, _ = saved(tmp_path, targets=targets)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["reversible_targets"]["layers"]["coupling"]["init"]  # as versions up to 0.2 did
    torch.save(checkpoint, path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{DIFFERS}")
        trainer(tmp_path, strategy=revlib.ReversibleStrategy(targets)).test(Plain(), data(), ckpt_path=path)
