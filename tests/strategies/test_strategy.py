from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_revlib as revlib
from lightning_revlib.nn.plan import profile as measure
from lightning_revlib.strategies.registry import NAMES


class Net(L.LightningModule):
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
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 8, generator=generator, dtype=torch.get_default_dtype())
    return DataLoader(TensorDataset(x), batch_size=8)


def trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 2, "default_root_dir": tmp_path, **quiet, **options})


def fit(tmp_path: Path, strategy: Any, **options: Any) -> Net:
    L.seed_everything(5, verbose=False)
    net = Net(options.pop("built", "init"))
    trainer(tmp_path, strategy=strategy, **options).fit(net, data(), data())
    return net


@pytest.mark.parametrize("built", ["init", "setup", "configure_model"])
@pytest.mark.parametrize("by", ["name", "instance", "callback"])
def test_the_loss_curve_is_that_of_the_stock_strategy(tmp_path: Path, by: str, built: str) -> None:
    options: dict[str, Any] = {
        "strategy": {"name": "reversible", "instance": revlib.ReversibleStrategy()}.get(by, "auto")
    }
    if by == "callback":
        options["callbacks"] = [revlib.ReversibleCallback()]
    plain = fit(tmp_path, "auto", precision="64-true", built=built)
    reversible = fit(tmp_path, precision="64-true", built=built, **options)
    assert type(plain.net) is revlib.CoupledSequential and type(reversible.net) is revlib.ReversibleSequential
    assert len(plain.losses) == 12
    for expected, loss in zip(plain.losses, reversible.losses, strict=True):
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for (name, expected), (other, value) in zip(
        plain.state_dict().items(), reversible.state_dict().items(), strict=True
    ):
        assert name == other and torch.allclose(expected, value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_precisions(tmp_path: Path, precision: Any) -> None:
    plain, reversible = (fit(tmp_path, strategy, precision=precision) for strategy in ("auto", "reversible"))
    tolerance = 1e-4 if precision == "32-true" else 0.1
    assert reversible.losses[-1].item() == pytest.approx(plain.losses[-1].item(), rel=tolerance)


def test_checkpoints_go_both_ways_and_into_a_plain_module(tmp_path: Path) -> None:
    paths = {}
    for strategy in ("auto", "reversible"):
        L.seed_everything(5, verbose=False)
        run = trainer(tmp_path, strategy=strategy, max_epochs=1)
        run.fit(Net(), data())
        paths[strategy] = tmp_path / f"{strategy}.ckpt"
        run.save_checkpoint(paths[strategy])
    states = {name: torch.load(path, weights_only=True) for name, path in paths.items()}
    assert list(states["auto"]["state_dict"]) == list(states["reversible"]["state_dict"]) == list(Net().state_dict())
    curves = []
    for start in ("auto", "reversible"):
        for then in ("auto", "reversible"):
            net = Net()
            torch.manual_seed(6)
            trainer(tmp_path, strategy=then, max_epochs=2).fit(net, data(), ckpt_path=paths[start], weights_only=True)
            curves.append([loss.item() for loss in net.losses])
    assert all(len(curve) == 6 and curve == pytest.approx(curves[0], rel=1e-4) for curve in curves)
    loaded = Net.load_from_checkpoint(paths["reversible"])
    assert type(loaded.net) is revlib.CoupledSequential


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_entries_without_fit(tmp_path: Path, entry: str) -> None:
    net = Net()
    getattr(trainer(tmp_path, strategy="reversible"), entry)(
        net, data(), **({} if entry == "predict" else {"verbose": False})
    )
    assert type(net.net) is revlib.ReversibleSequential


def test_fitting_twice_and_after_validation(tmp_path: Path) -> None:
    net = Net()
    trainer(tmp_path, strategy="reversible").validate(net, data(), verbose=False)
    trainer(tmp_path, strategy="reversible").fit(net, data(), data())
    trainer(tmp_path, strategy="auto").fit(net, data())
    assert len(net.losses) == 24


def test_targets_of_the_strategy_win_over_those_of_the_module(tmp_path: Path) -> None:
    class Named(Net):
        reversible_targets = {"net": {"coupling": "midpoint"}}  # noqa: RUF012

    class Called(Net):
        def reversible_targets(self) -> Any:
            return {"net": {"coupling": "leapfrog"}}

    for cls, targets, coupling in (
        (Named, None, revlib.Midpoint()),
        (Called, None, revlib.Leapfrog()),
        (Named, {"n?t": {"coupling": {"name": "momentum", "gamma": 0.9}}}, revlib.Momentum()),
    ):
        net = cls()
        trainer(tmp_path, strategy=revlib.ReversibleStrategy(targets=targets), max_epochs=1).fit(net, data())
        assert net.net.couplings == (coupling,)


def test_nothing_to_swap_and_wrong_targets_are_errors(tmp_path: Path) -> None:
    class Plain(Net):
        def build(self) -> None:
            self.net = nn.Sequential(nn.Linear(16, 16))  # type: ignore[assignment]

    for targets, message in ((None, "nothing to swap: Plain has no"), ({"nett": {}}, "target 'nett' matches no")):
        for options in (
            {"strategy": revlib.ReversibleStrategy(targets=targets)},
            {"callbacks": [revlib.ReversibleCallback(targets=targets)]},
        ):
            with pytest.raises(ValueError, match=message):
                trainer(tmp_path, **options).fit(Plain(), data())


ORDERS = {
    "lightning first": "import lightning, lightning_revlib",
    "lightning_revlib first": "import sys, lightning_revlib\nassert 'lightning' not in sys.modules\nimport lightning",
    "pytorch names only": "from lightning_revlib import ReversibleSequential\nimport lightning",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_name_is_registered_whatever_is_imported_first(order: str) -> None:
    code = ORDERS[order] + "\nlightning.Trainer(strategy='reversible', accelerator='cpu', logger=False)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def budgeted(by: str) -> dict[str, Any]:
    """A budget for all stacks by the strategy, by the callback under another strategy, or for one stack."""
    if by == "callback":
        return {"strategy": "auto", "callbacks": [revlib.ReversibleCallback(memory_budget=0.8)]}
    options = {"memory_budget": 0.8} if by == "strategy" else {"targets": {"net": {"memory_budget": 0.8}}}
    return {"strategy": revlib.ReversibleStrategy(**options)}


@pytest.mark.parametrize("by", ["strategy", "callback", "stack"])
def test_a_memory_budget_changes_bytes_only(tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fit(tmp_path, "reversible", precision="64-true")
    L.seed_everything(5, verbose=False)
    net = Net()
    run = trainer(tmp_path, precision="64-true", **budgeted(by))
    run.fit(net, data(), data())
    for expected, loss in zip(plain.losses, net.losses, strict=True):
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    plan = net.net.plan
    assert plan.peak <= plan.limit < plan.plain and set(plan.treatments["net"]) != {"reversible"}
    run.save_checkpoint(path := tmp_path / "a.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert by == "stack" or checkpoint["memory_plan"]["treatments"] == {"net": plan.treatments["net"]}

    monkeypatch.setattr(measure, "measure", lambda *args, **kwargs: pytest.fail("measured again"))
    again = Net()
    trainer(tmp_path, precision="64-true", max_epochs=9, **budgeted(by)).fit(again, data(), data(), ckpt_path=path)
    assert again.net.plan == plan


def test_a_budget_too_small_and_a_wrong_one_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="memory_budget='2 pounds'"):
        revlib.ReversibleStrategy(memory_budget="2 pounds")
    with pytest.raises(ValueError, match="memory_budget=64 is 64 B, and the reversible stacks need at least"):
        trainer(tmp_path, max_epochs=1, strategy=revlib.ReversibleStrategy(memory_budget=64)).fit(Net(), data())


@pytest.mark.parametrize("name", [name for name in NAMES if "deepspeed" not in name])
@pytest.mark.parametrize("devices", [1, 2])
def test_what_a_name_stands_for(tmp_path: Path, name: str, devices: int) -> None:
    cls = NAMES[name][0]
    many = "ReversibleDDPStrategy" if cls == "ReversibleStrategy" else cls
    strategy = trainer(tmp_path, strategy=name, devices=devices).strategy
    assert type(strategy).__name__ == (cls if devices == 1 else many)
    assert strategy.world_size == devices


def test_a_later_run_has_its_own_budget(tmp_path: Path) -> None:
    net = Net()
    with pytest.raises(ValueError, match="memory_budget=64"):
        trainer(tmp_path, max_epochs=1, strategy=revlib.ReversibleStrategy(memory_budget=64)).fit(net, data())
    both: dict[str, Any] = {"strategy": revlib.ReversibleStrategy(memory_budget=0.9)}
    trainer(tmp_path, max_epochs=1, **both, callbacks=[revlib.ReversibleCallback()]).fit(net, data())
    assert net.net.plan.limit == int(0.9 * net.net.plan.plain)
    trainer(tmp_path, max_epochs=1, strategy="reversible").fit(net, data())
    assert net.net.plan is None


def test_figures_of_stacks_that_a_budget_no_longer_plans_are_passed_over(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1, **budgeted("strategy"))
    run.fit(Net(), data(), data())
    run.save_checkpoint(path := tmp_path / "a.ckpt")
    strategy = revlib.ReversibleStrategy({"net": {"store_last": 1}}, memory_budget=0.8)
    again = Net()
    trainer(tmp_path, max_epochs=2, strategy=strategy).fit(again, data(), data(), ckpt_path=path)
    assert again.net.plan is None and strategy.budget.state_dict() == {} and not strategy.budget._last
