"""Lightning features give the same results under the reversible and the stock strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    ModelPruning,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.callbacks.weight_averaging import EMAWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader

import lightning_revlib as revlib
from tests.strategies.helpers import Net, data, fit, trainer

PLAIN, OURS = "auto", "reversible"


def fit_with(tmp_path: Path, strategy: str, cls: type[Net] = Net, callbacks: Any = list, **options: Any) -> Net:
    return fit(tmp_path, strategy, cls, **{"precision": "64-true", "callbacks": callbacks(), **options})


def same(first: nn.Module, second: nn.Module, tolerance: float = 1e-10) -> None:
    for (name, a), (other, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert name == other and torch.allclose(a, b, rtol=tolerance, atol=tolerance), name


class Frozen(Net):
    """It has the `backbone` that BackboneFinetuning asks for."""

    @property
    def backbone(self) -> nn.Module:
        return self.net

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 1e-2)


class Manual(Net):
    """It has two optimizers, one of which steps every second batch."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        first, second = self.optimizers()  # type: ignore[misc]
        loss = (self(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()
        self.manual_backward(loss)
        self.clip_gradients(first, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            second.step()
            second.zero_grad()

    def configure_optimizers(self) -> Any:
        rest = [*self.stem.parameters(), *self.head.parameters()]
        return torch.optim.Adam(self.net.parameters(), 1e-2), torch.optim.SGD(rest, 1e-2)


#     name: options of the Trainer; `cls` is the module's class, `callbacks` makes callbacks
FEATURES: dict[str, dict[str, Any]] = {
    "accumulation": {"accumulate_grad_batches": 4},
    "clipping by norm": {"gradient_clip_val": 0.3},
    "clipping by value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    "weight averaging": {"callbacks": lambda: [WeightAveraging()]},
    "exponential averaging": {"callbacks": lambda: [EMAWeightAveraging(decay=0.9)]},
    "stochastic averaging": {
        "callbacks": lambda: [StochasticWeightAveraging(1e-3, swa_epoch_start=1)],
        "max_epochs": 4,
    },
    "summary": {"callbacks": lambda: [ModelSummary(-1)]},
    "early stopping": {"callbacks": lambda: [EarlyStopping("loss", patience=1)], "max_epochs": 4},
    "fine-tuning": {
        "cls": Frozen,
        "callbacks": lambda: [BackboneFinetuning(1, backbone_initial_lr=1e-3, verbose=False)],
        "max_epochs": 3,
    },
    "pruning": {
        "callbacks": lambda: [ModelPruning("l1_unstructured", amount=0.2, parameters_to_prune=None)],
        "precision": "32-true",
    },
    "two optimizers": {"cls": Manual},
    "anomalies": {"detect_anomaly": True, "max_epochs": 1},
    "simple profiler": {"profiler": "simple"},
    "torch's profiler": {"profiler": "pytorch", "max_epochs": 1},
    "deterministic": {"deterministic": True},
    "validation within epochs": {"val_check_interval": 2},
    "overfitting": {"overfit_batches": 2},
    "one batch": {"fast_dev_run": True},
    "barebones": {"barebones": True},
    "no inference mode": {"inference_mode": False},
}


@pytest.fixture(autouse=True)
def settings() -> Any:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", FEATURES)
def test_as_the_stock_strategy(tmp_path: Path, name: str) -> None:
    if name == "barebones":
        options: dict[str, Any] = {"logger": None, "enable_progress_bar": None, "enable_model_summary": None}
        FEATURES[name].update(options, enable_checkpointing=None)
    plain, ours = (fit_with(tmp_path, strategy, **FEATURES[name]) for strategy in (PLAIN, OURS))
    assert type(ours.net) is revlib.ReversibleSequential
    same(plain, ours, 1e-5 if name == "pruning" else 1e-10)


@pytest.mark.parametrize("precision", ["16-true", "16-mixed"])
def test_half_precision(tmp_path: Path, precision: str) -> None:
    """The other precisions are in test_strategy.py."""
    plain, ours = (fit(tmp_path, strategy, max_epochs=1, precision=precision) for strategy in (PLAIN, OURS))
    assert ours.losses[-1].item() == pytest.approx(plain.losses[-1].item(), rel=0.1, nan_ok=True)


def test_the_learning_rate_finder(tmp_path: Path) -> None:
    class Rate(Net):
        lr = 1e-2

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.lr)

    found = []
    for strategy in (PLAIN, OURS):
        L.seed_everything(5, verbose=False)
        net = Rate()
        run = trainer(tmp_path, strategy=strategy, precision="64-true")
        finder = Tuner(run).lr_find(net, data(), num_training=40)
        assert finder is not None
        found.append(finder.results["loss"])
    assert len(found[0]) > 10 and found[0] == pytest.approx(found[1], rel=1e-9)
    trainer(tmp_path, strategy=OURS, callbacks=[LearningRateFinder(num_training_steps=10)]).fit(Rate(), data())


class Coupled(Net):
    """Takes a coupling as a hyperparameter."""

    def __init__(self, coupling: revlib.Coupling) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = revlib.CoupledSequential(*self.net, coupling=coupling)


@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("coupling", [revlib.Additive(), revlib.Midpoint(0.3), revlib.Momentum(0.8)], ids=str)
def test_a_coupling_as_a_hyperparameter(tmp_path: Path, logger: Any, coupling: revlib.Coupling) -> None:
    options: dict[str, Any] = {"logger": logger(tmp_path), "max_epochs": 1, "strategy": OURS}
    run = trainer(tmp_path, **options)
    run.fit(Coupled(coupling), data())
    run.save_checkpoint(path := tmp_path / "a.ckpt")
    assert Coupled.load_from_checkpoint(path, weights_only=False).hparams["coupling"] == coupling
    trainer(tmp_path, **options | {"max_epochs": 2}).fit(Coupled(coupling), data(), ckpt_path=path)


class Sized(Net):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return DataLoader(data().dataset, batch_size=self.batch_size)

    val_dataloader = train_dataloader


def test_the_batch_size_finder_and_a_memory_budget(tmp_path: Path) -> None:
    net, run = Sized(), trainer(tmp_path, strategy=revlib.ReversibleStrategy(memory_budget="4KiB"), max_epochs=1)
    assert Tuner(run).scale_batch_size(net, steps_per_trial=1) == net.batch_size == 8
    run.fit(net)
    assert net.net.plan.peak <= 4096
    net.batch_size = 48
    with pytest.raises(ValueError, match=r"memory_budget='4KiB' is .*, and the reversible stacks need"):
        trainer(tmp_path, strategy=revlib.ReversibleStrategy(memory_budget="4KiB"), callbacks=[Callback()]).fit(net)


def test_the_batch_size_finder(tmp_path: Path) -> None:
    net = Sized()
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=1)
    trainer(tmp_path, strategy=OURS, callbacks=[finder], max_epochs=1).fit(net)
    assert net.batch_size > 2


def test_shuffled_batches_come_in_the_stock_order(tmp_path: Path) -> None:
    """One device takes no DistributedSampler, which would shuffle otherwise."""
    nets = []
    for strategy in (PLAIN, OURS):
        L.seed_everything(5, verbose=False)
        net = Net(dropout=0.0)
        loader = DataLoader(data().dataset, batch_size=8, shuffle=True)
        trainer(tmp_path, strategy=strategy, precision="64-true").fit(net, loader)
        nets.append(net)
    same(*nets)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["module", "block"])
def test_compile(tmp_path: Path, what: str) -> None:
    nets = []
    for strategy in (PLAIN, OURS):
        L.seed_everything(5, verbose=False)
        net: Any = Net(dropout=0.0)
        if what == "block":
            for block in net.net:
                block.compile(backend="aot_eager")
        module: Any = torch.compile(net, backend="aot_eager") if what == "module" else net
        trainer(tmp_path, strategy=strategy, precision="64-true").fit(module, data())
        nets.append(net)
    same(*nets)


CLI = {
    "by name": ["--trainer.strategy=reversible"],
    "by class": ["--trainer.strategy.class_path=lightning_revlib.ReversibleStrategy"],
    "with options": [
        "--trainer.strategy.class_path=lightning_revlib.ReversibleStrategy",
        "--trainer.strategy.init_args.optimizer_in_backward=true",
        '--trainer.strategy.init_args.targets={"net": {"coupling": "midpoint"}}',
    ],
}


@pytest.mark.parametrize("how", CLI)
def test_lightning_cli(tmp_path: Path, how: str) -> None:
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    class Given(Net):
        def train_dataloader(self) -> Any:
            return data()

        val_dataloader = train_dataloader

    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.max_epochs=1"]
    where = [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    cli = LightningCLI(Given, args=["fit", *quiet, *where, *CLI[how]], save_config_callback=None)
    assert type(cli.model.net) is revlib.ReversibleSequential
    if how == "with options":
        assert cli.model.net.couplings == (revlib.Midpoint(),)
        assert cli.trainer.strategy.optimizer_in_backward is not None


def test_hydra_containers_become_plain(tmp_path: Path) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    cfg = OmegaConf.create(
        {
            "_target_": "lightning_revlib.ReversibleStrategy",
            "targets": {"net": {"coupling": {"name": "momentum", "gamma": 0.8}}},
        }
    )
    net = Net()
    strategy = instantiate(cfg)
    assert type(strategy.targets) is dict and type(strategy.targets["net"]) is dict
    run = trainer(tmp_path, strategy=strategy, max_epochs=1)
    run.fit(net, data())
    assert net.net.couplings == (revlib.Momentum(0.8),)
    run.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
